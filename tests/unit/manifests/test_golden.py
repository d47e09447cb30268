"""The manifests, word for word.

After a wanted change `PYTHONPATH=tests python -m unit.manifests.test_golden` writes the files again; read the diff.
"""

from pathlib import Path

import pytest
import yaml

from disttrain.api.gangs import GANG_SCHEDULERS
from disttrain.api.names import POD_GROUPS
from disttrain.api.policies import Tls
from disttrain.manifests import CHILDREN, build_pod, build_secret
from unit.manifests.jobs import JOBS

FOLDER = Path(__file__).parent / "golden"
IMAGE = "disttrain/trainer:test"


class _Plain(yaml.SafeDumper):
    """YAML without anchors: what two places share is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def manifests(name: str) -> str:
    """All that a job of jobs.py becomes, as one YAML stream."""
    job, pods = JOBS[name]
    encrypted = job.spec.network.tls is Tls.MUTUAL
    scheduler = GANG_SCHEDULERS.get(job.spec.scheduling.gang)
    group = scheduler.kind if scheduler is not None else None
    objects = [build(job) for kind, build in CHILDREN.items() if kind not in POD_GROUPS or kind is group]
    objects += [build_secret(job, {"tls.key": b"random"})] if encrypted else []
    objects += [build_pod(job, role, index, attempt=2, trainer_image=IMAGE, pod_group=group) for role, index in pods]
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=140)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_manifests_are_as_written_down(name: str) -> None:
    assert manifests(name) == (FOLDER / f"{name}.yaml").read_text()


def test_every_job_has_its_golden_file() -> None:
    assert sorted(JOBS) == sorted(path.stem for path in FOLDER.glob("*.yaml"))


if __name__ == "__main__":
    for each in JOBS:
        (FOLDER / f"{each}.yaml").write_text(manifests(each))
