"""What Grafana does with a dashboard before it asks Prometheus: its variables filled in. For tests and for the preview."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARDS = {path.stem: path for path in sorted((MONITORING / "dashboards").glob("*.json"))}
PICKED = {
    "job": {"namespace": "demo", "job_name": "digits", "rank": ".*"},
    "operator": {"namespace": "disttrain-system"},
}
"""What the user picked in the variables, in the recording."""


def load(name: str) -> dict[str, Any]:
    return json.loads(DASHBOARDS[name].read_text(encoding="utf-8"))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that draw something."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def targets(dashboard: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield panel, target


def interval(panel: dict[str, Any], seconds: int = 15) -> int:
    """The distance of two points: what the width of the panel makes of the time range, or the panel's own minimum."""
    least = {"": 0, "1m": 60}[panel.get("interval", "")]
    return max(least, seconds)


def fill(expr: str, picked: dict[str, str], *, seconds: int, interval: int = 15, scrape: int = 5) -> str:
    """Grafana's own variables as Grafana computes them, then the user's."""
    values = picked | {
        "__rate_interval": f"{max(interval + scrape, 4 * scrape)}s",
        "__interval": f"{interval}s",
        "__interval_ms": str(interval * 1000),
        "__range": f"{seconds}s",
        "__range_s": str(seconds),
    }
    return re.sub(r"\$(\w+)|\$\{(\w+)\}", lambda match: values[match[1] or match[2]], expr)
