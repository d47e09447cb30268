"""The Grafana dashboards, as Python that prints JSON: one job (job.json) and the operator (operator.json).

    python deploy/monitoring/dashboards.py           writes deploy/monitoring/dashboards/*.json
    python deploy/monitoring/dashboards.py --check   fails when they are stale

Every query is over the metrics as exported, never over a recording rule, so that the dashboards work on a Prometheus that has
none of our rules. What is shown is in job_dashboard.py and operator_dashboard.py, how a panel is made in panels.py.
"""

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from job_dashboard import job
from operator_dashboard import operator

FOLDER = Path(__file__).parent / "dashboards"


def render() -> dict[str, str]:
    """File name -> content."""
    return {
        f"{name}.json": json.dumps(build(), cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"
        for name, build in (("job", job), ("operator", operator))
    }


def main(arguments: list[str]) -> int:
    stale = [
        FOLDER / name
        for name, content in render().items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != content
    ]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.name} is stale: run python deploy/monitoring/dashboards.py", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(render()[path.name], encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
