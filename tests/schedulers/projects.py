"""The gang schedulers of others: their CRDs from their own modules, their programs, and how each is started."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.controlplane import ControlPlane
from cluster.processes import Program
from cluster.programs import COSCHEDULING, VOLCANO, Set, program, source_of


@dataclass(frozen=True)
class Project:
    """One of them."""

    gang: str
    """The value of scheduling.gang."""
    module: str
    groups: str
    """The path of its PodGroups in the API."""
    crds: Sequence[str]
    """Folders of its module."""
    programs: Callable[[ControlPlane, Path], list[Program]]
    """How they are started, by the kubeconfig that they are to use."""
    label: str
    """In the names of tests and of logs."""
    needs: Set = "schedulers"
    placed: int = 0
    """How many of 8 pods it places that each need a node, where there are 7."""

    def install(self, control_plane: ControlPlane) -> None:
        for folder in self.crds:
            control_plane.kubectl("apply", "--server-side", "-f", str(source_of(self.module) / folder))

    @contextlib.contextmanager
    def running(self, control_plane: ControlPlane) -> Iterator[None]:
        config = control_plane.kubeconfig_for(self.label, groups=["system:masters"])
        programs = self.programs(control_plane, config)
        control_plane.programs += programs
        try:
            for one in programs:
                one.start()
            yield
        finally:
            for one in programs:
                one.stop(signal.SIGKILL)
                control_plane.programs.remove(one)


def _coscheduling(control_plane: ControlPlane, config: Path) -> list[Program]:
    """As a second scheduler, with the profile of its chart."""
    plugins = {"multiPoint": {"enabled": [{"name": "Coscheduling"}], "disabled": [{"name": "PrioritySort"}]}}
    controller = [str(program("coscheduling-controller")), "--metricsAddr=0", "--probeAddr=0"]
    return [
        _second_scheduler("coscheduling-scheduler", control_plane, config, plugins),
        Program("coscheduling-controller", controller, control_plane.folder, env={"KUBECONFIG": str(config)}),
    ]


def _without_plugin(control_plane: ControlPlane, config: Path) -> list[Program]:
    """Kubernetes' own under the name of the other: PodGroups are there, and it knows nothing of them."""
    return [_second_scheduler("kube-scheduler", control_plane, config, {})]


def _second_scheduler(name: str, control_plane: ControlPlane, config: Path, plugins: Any) -> Program:
    file = control_plane.folder / f"{name}.json"
    configuration = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {"kubeconfig": str(config)},
        "profiles": [{"schedulerName": "scheduler-plugins-scheduler", "plugins": plugins}],
    }
    file.write_text(json.dumps(configuration))
    return control_plane.layout.program(name, f"--config={file}", "--secure-port=0")


def _volcano(control_plane: ControlPlane, config: Path) -> list[Program]:
    """With the actions and plugins of its chart. Its webhooks, which fill in defaults, are not there."""
    plugins = source_of(VOLCANO) / "installer/helm/chart/volcano/config/volcano-scheduler.conf"
    common = (f"--kubeconfig={config}", "--leader-elect=false")
    scheduler = (f"--scheduler-conf={plugins}", "--cache-dumper=false")
    return [
        control_plane.layout.program("volcano-scheduler", *common, *scheduler),
        control_plane.layout.program("volcano-controllers", *common),
    ]


_COSCHEDULING = Project(
    "Coscheduling",
    COSCHEDULING,
    "apis/scheduling.x-k8s.io/v1alpha1/{}/podgroups",
    ["config/crd/bases"],
    _coscheduling,
    "coscheduling",
)
VOLCANO_PROJECT = Project(
    "Volcano",
    VOLCANO,
    "apis/scheduling.volcano.sh/v1beta1/{}/podgroups",
    ["config/crd/volcano/bases", "config/crd/jobflow/bases"],
    _volcano,
    "volcano",
)
GANG_SCHEDULERS = (_COSCHEDULING, VOLCANO_PROJECT)
PROJECTS = (
    replace(_COSCHEDULING, label="without-plugin", programs=_without_plugin, needs="apiserver", placed=7),
    *GANG_SCHEDULERS,
)
