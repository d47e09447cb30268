"""A kind of child is one rule, one manifest and one place: every table has every kind, and they agree."""

from __future__ import annotations

import pytest

from disttrain.api.names import ChildKind
from disttrain.kube.api import CHILDREN as PLACES
from disttrain.manifests import CHILDREN as MANIFESTS
from disttrain.plan.children import NEEDED
from unit.manifests.jobs import JOBS


@pytest.mark.parametrize("kind", ChildKind)
def test_every_kind_has_a_rule_a_manifest_and_a_place(kind: ChildKind) -> None:
    job, _ = next(iter(JOBS.values()))
    manifest, place = MANIFESTS[kind](job), PLACES[kind]
    assert kind in NEEDED
    assert (manifest["kind"], manifest["metadata"]["name"]) == (place.kind, job.metadata.name)
    assert manifest["apiVersion"] == "/".join(filter(None, (place.group, place.version)))
    assert place.kind == kind.partition(" of ")[0]
