"""The plan decides, the controller carries out: it names no condition, no reason and no state, and its writer no field of the status.

And the plan knows when to look again, because every comparison with the time goes through one method.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from disttrain import controller, plan
from disttrain.api.status import DistTrainJobStatus

MODULES = sorted(Path(controller.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("module", [path for path in MODULES if path.stem != "metrics"], ids=lambda path: path.stem)
def test_controller_names_no_condition_reason_or_state(module: Path) -> None:
    imported = [node.module for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ImportFrom)]
    assert "disttrain.api.reasons" not in imported, "metrics.py alone counts by them"


def test_status_writer_names_no_field_of_the_status() -> None:
    fields = {name for field, info in DistTrainJobStatus.model_fields.items() for name in (field, info.alias)}
    source = next(path for path in MODULES if path.stem == "status").read_text()
    literals = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert literals & fields == set()


def test_policies_compare_the_time_by_one_method_alone() -> None:
    """`JobView.reached` notes the moments that have not come: after a comparison that it does not see, no pass would follow."""
    found = []
    for module in sorted(Path(plan.__path__[0]).rglob("*.py")):
        for function in ast.walk(ast.parse(module.read_text())):
            if isinstance(function, ast.FunctionDef):
                compared = (node for node in ast.walk(function) if isinstance(node, ast.Compare))
                names = {node.attr for one in compared for node in ast.walk(one) if isinstance(node, ast.Attribute)}
                found += [f"{module.name}: {function.name}"] * ("now" in names)
    assert found == ["view.py: reached"]
