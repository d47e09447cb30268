"""Recording rules and alerts: promtool's own checks, and that each alert is tested and has its page."""

import re

import yaml

from monitoring.contract import METRICS
from monitoring.grafana import MONITORING
from monitoring.server import promtool

HERE = MONITORING.parents[1] / "tests" / "monitoring"
RULES = MONITORING / "prometheus" / "rules.yml"
KNOWN = {series for name, metric in METRICS.items() for series in metric.names(name)}


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_promtool_accepts_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml", cwd=HERE)


def test_every_alert_is_seen_to_fire_and_to_be_silent() -> None:
    checks = [
        check
        for test in yaml.safe_load((HERE / "rules_test.yml").read_text())["tests"]
        for check in test.get("alert_rule_test", [])
    ]
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == alerts().keys()
    assert {check["alertname"] for check in checks if not check["exp_alerts"]} == alerts().keys()


def test_every_recorded_series_is_tested_or_used_by_a_tested_alert() -> None:
    used = " ".join(rule["expr"] for rule in alerts().values()) + (HERE / "rules_test.yml").read_text()
    assert [rule["record"] for rule in rules() if "record" in rule and rule["record"] not in used] == []


def test_every_alert_says_what_how_bad_and_where_to_read_on() -> None:
    page = (MONITORING / "runbooks.md").read_text()
    anchors = {heading.lower() for heading in re.findall(r"^## (\w+)$", page, re.MULTILINE)}
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in {"info", "warning", "critical"}, name
        assert alert["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert file == "runbooks.md", name
        assert anchor == name.lower(), name
    assert anchors == {name.lower() for name in alerts()}, "a section an alert, no more"


def test_rules_stand_on_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        # a name that is followed by an equals sign is a label, a quoted one its value
        names = set(re.findall(r'(?<!")\b(disttrain[_:][a-z0-9_:]+)\b(?!\s*=~?")', rule["expr"]))
        assert names <= KNOWN | recorded, rule
