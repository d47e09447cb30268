"""The benchmark of a burst runs, and counts what both sides create; how fast is not a test's to say."""

import re
import subprocess
import sys
from pathlib import Path

from cluster.programs import require


def test_a_burst_of_few_jobs_counts_the_pods_and_writes_of_both_sides() -> None:
    require("apiserver")
    burst = Path(__file__).parents[2] / "benchmarks" / "burst.py"
    command = [sys.executable, str(burst), "--jobs=3", "--rounds=1", "--idle=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    figures = {
        name.strip(): float(value) for name, value in re.findall(r"^(.{52}) (\S+) \(", done.stdout, re.MULTILINE)
    }
    assert figures["pods create"] == 4
    assert figures["services create"] == figures["networkpolicies create"] == 1
    assert figures["operator / bare client"] > 0
    assert re.search(r"^operator / bare client .*; target >= 0\.5$", done.stdout, re.MULTILINE)
