"""What a user does, on a real node with the real images: install, apply the examples, watch, kill things, read the numbers.

Jane has the rights of `edit` in one namespace, which enforces the restricted Pod Security Standard, and none elsewhere.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.node import Node
from cluster.prometheus import Prometheus, prometheus

ROOT = Path(__file__).parents[2]
JANE = "jane"
TEAM = "team"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def installation(node: Node) -> Iterator[None]:
    node.kubectl("apply", "-k", str(ROOT / "tests/cluster/install"), timeout=120)
    rollout = ["rollout", "status", "deployment/disttrain-operator", "--timeout=120s"]
    node.kubectl("-n", "disttrain-system", *rollout, timeout=130)
    with node.namespace(TEAM):
        node.user(JANE, namespace=TEAM)
        yield


@pytest.fixture(scope="module")
def metrics(node: Node) -> Iterator[Prometheus]:
    with prometheus(node) as running:
        yield running


def documents(example: str) -> list[dict[str, Any]]:
    return [doc for doc in yaml.safe_load_all((ROOT / "examples" / example).read_text()) if doc]


def job_of(example: str, name: str) -> dict[str, Any]:
    """The example's job under another name, without a checkpoint volume."""
    job = next(doc for doc in documents(example) if doc["kind"] == "DistTrainJob")
    job["metadata"]["name"] = name
    job["spec"].pop("checkpoint", None)
    return job


def apply(node: Node, example: str, **changes: dict[str, Any]) -> str:
    """As Jane; volumes for the claims of the file are the cluster's business. Returns the job's name.

    changes: what else is in a section of the spec, as trainer={"maxSteps": 20}."""
    docs = documents(example)
    [job] = [doc for doc in docs if doc["kind"] == "DistTrainJob"]
    for section, fields in changes.items():
        job["spec"].setdefault(section, {}).update(fields)
    for doc in docs:
        if doc["kind"] == "PersistentVolumeClaim":
            volume(node, doc["metadata"]["name"], doc["spec"]["accessModes"][0])
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=docs, user=JANE)
    return str(job["metadata"]["name"])


def volume(node: Node, claim: str, access: str) -> Path:
    """The folder of a claim that an example makes."""
    if f"{TEAM}-{claim}" in node.kubectl("get", "pv", "-o", "name"):
        return node.folder / "volumes" / f"{TEAM}-{claim}"
    return node.volume(claim, namespace=TEAM, access=access, make_claim=False)


def complete(node: Node, name: str, *, seconds: int = 240) -> dict[str, Any]:
    """Waits as a script would, and returns the status."""
    node.kubectl(
        "wait",
        "--for=condition=Complete",
        f"dtj/{name}",
        "-n",
        TEAM,
        f"--timeout={seconds}s",
        user=JANE,
        timeout=seconds + 10,
    )
    status: dict[str, Any] = node.get("dtj", name, namespace=TEAM)["status"]
    return status


def training(node: Node, name: str) -> dict[str, Any]:
    status: dict[str, Any] = node.get("dtj", name, namespace=TEAM).get("status", {}).get("training") or {}
    return status


def cells(header: str, row: str) -> dict[str, str]:
    """A row of `kubectl get` by its columns. They begin where their names do: an empty cell is blank, and would shift a split."""
    names = list(re.finditer(r"\S+", header))
    ends = [*(name.start() for name in names[1:]), None]
    return {name[0]: row[name.start() : end].strip() for name, end in zip(names, ends, strict=True)}


def test_the_digits_example_trains_and_its_numbers_arrive_everywhere(node: Node, metrics: Prometheus) -> None:
    name = apply(node, "digits-ps.yaml")
    status = complete(node, name)
    assert status["state"] == "Complete"
    assert float(status["training"]["evaluation"]["accuracy"]) >= 0.97
    assert status["training"]["step"] == status["training"]["totalSteps"]
    assert "restarts" not in status or status["restarts"]["total"] == 0

    header, row = node.kubectl("get", "dtj", name, "-n", TEAM, user=JANE).splitlines()
    assert header.split() == [
        "NAME",
        "STATE",
        "STRATEGY",
        "WORKERS",
        "STEP",
        "PROGRESS",
        "LOSS",
        "SAMPLES/S",
        "RESTARTS",
        "ETA",
        "AGE",
    ]
    shown = cells(header, row)
    assert [shown[column] for column in ("NAME", "STATE", "STRATEGY")] == [name, "Complete", "ParameterServer"]
    assert (shown["STEP"], shown["PROGRESS"]) == (str(status["training"]["totalSteps"]), "100")
    assert 0 < float(shown["LOSS"]) < 2.3  # below ln 10, the loss of a guess among ten digits
    assert float(shown["SAMPLES/S"]) > 0

    of_job = f'namespace="{TEAM}",job_name="{name}"'
    ranks = {
        labels["rank"] for labels in metrics.labels(f'max_over_time(disttrain_loss{{{of_job},role="worker"}}[10m])')
    }
    assert ranks == {"0", "1"}
    [loss] = metrics.query(f"min(min_over_time(disttrain_loss{{{of_job}}}[10m]))")
    assert 0 < float(loss["value"][1]) < 2.3  # below ln 10, the loss of a guess among ten digits
    [rate] = metrics.query(f'max(max_over_time(disttrain_samples_per_second{{{of_job},role="master"}}[10m]))')
    assert float(rate["value"][1]) > 0
    finished = 'disttrain_operator_jobs_finished_total{result="Complete"}'
    node.wait_for("the operator's count to be scraped", lambda: metrics.query(finished), 30)

    events = node.kubectl("get", "events", "-n", TEAM, "--field-selector", f"involvedObject.name={name}", user=JANE)
    assert "Created" in events


def begun(node: Node, name: str) -> None:
    """A longer job of the first example trains."""
    job = job_of("digits-ps.yaml", name)
    job["spec"]["trainer"]["epochs"] *= 4
    job["spec"]["observability"] = {"statusIntervalSeconds": 1}  # so that it is seen to train long before its end
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=job, user=JANE)
    node.wait_for("the job to train", lambda: training(node, name).get("step", 0) > 0, 120)


def test_a_killed_rank_comes_back_in_its_pod_and_the_job_completes(node: Node) -> None:
    begun(node, "in-place")
    before = node.get("pod", "in-place-worker-1", namespace=TEAM)["metadata"]["uid"]
    node.kill_child(TEAM, "in-place-worker-1")
    restarts = node.wait_for(
        "it to be counted", lambda: node.get("dtj", "in-place", namespace=TEAM)["status"].get("restarts"), 60
    )
    assert [(one["pod"], one["restarts"], one["failures"]) for one in restarts["inPlace"]] == [(before, 1, 1)]
    pod = node.get("pod", "in-place-worker-1", namespace=TEAM)
    (container,) = pod["status"]["containerStatuses"]
    assert (pod["metadata"]["uid"], container["restartCount"], list(container["state"])) == (before, 0, ["running"])
    status = complete(node, "in-place")
    assert (status["restarts"]["total"], status["restarts"]["last"]["exitCode"]) == (1, 137)
    assert float(status["training"]["evaluation"]["accuracy"]) >= 0.97
    about = "--field-selector=involvedObject.name=in-place"
    reasons = node.kubectl("get", "events", "-n", TEAM, about, "-o", "jsonpath={.items[*].reason}", user=JANE).split()
    assert reasons.count("RestartedInPlace") == 1


def test_a_killed_worker_is_replaced_and_the_job_completes(node: Node) -> None:
    begun(node, "killed")
    node.kill_pod(TEAM, "killed-worker-1")
    status = complete(node, "killed")
    assert status["restarts"]["total"] == 1
    assert status["restarts"]["last"]["role"] == "Worker"
    assert status["restarts"]["last"]["exitCode"] == 137
    assert float(status["training"]["evaluation"]["accuracy"]) >= 0.97


_HELD = """
import time
from pathlib import Path
from disttrain_trainer.examples import {example}
steps = 0
def loss(model, batch):
    global steps
    steps += 1
    while steps == {step} and not Path("/checkpoints/go-on").exists():
        time.sleep(0.05)
    return {example}.loss(model, batch)
"""


@contextlib.contextmanager
def held(node: Node, example: str, *, module: str, step: int, steps: int, **changes: dict[str, Any]) -> Iterator[str]:
    """The example's job in so many steps; all its workers wait in one of them until the block's end. A checkpoint is every 10 steps."""
    code = {"held.py": _HELD.format(example=module, step=step)}
    held = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"held-{module}"}, "data": code}
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=held, user=JANE)
    trainer = {"loss": "held:loss", "code": {"configMap": f"held-{module}"}, "maxSteps": steps, "epochs": None}
    changes |= {"trainer": trainer, "checkpoint": {"everySteps": 10}, "observability": {"statusIntervalSeconds": 1}}
    name = apply(node, example, **changes)
    yield name
    (volume(node, f"{name}-checkpoints", "ReadWriteOnce") / "go-on").touch()


def certificates(pod: dict[str, Any]) -> list[str]:
    """The Secrets that a pod mounts."""
    return [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume]


def test_a_model_cut_over_workers_goes_on_from_its_checkpoint_when_a_pod_is_lost(node: Node) -> None:
    """Each worker holds a part of the state that no other holds. All that they send is encrypted, by the certificate of a Secret."""
    tls = {"tls": "Mutual"}
    with held(node, "charlm-fully-shard.yaml", module="charlm", step=16, steps=20, network=tls) as name:
        node.wait_for("a checkpoint", lambda: training(node, name).get("lastCheckpoint", {}).get("step") == 10, 120)
        node.kill_pod(TEAM, f"{name}-worker-1")
    status = complete(node, name)
    assert (status["restarts"]["total"], status["restarts"]["last"]["exitCode"]) == (1, 137)
    assert "round 2 begins at step 10" in node.kubectl("logs", f"{name}-worker-0", "-n", TEAM)
    assert status["training"]["step"] == 20
    first, second = (node.get("pod", f"{name}-{pod}", namespace=TEAM) for pod in ("master-0", "worker-1"))
    assert certificates(first) == certificates(second) != []  # the attempt's, which the later pod has, too
    assert float(status["training"]["evaluation"]["bits_per_character"]) < 5.5  # a guess is above 6


def test_a_lost_pod_of_a_job_with_replicated_data_gets_its_copies_from_the_others(node: Node, tmp_path: Path) -> None:
    """Packed data on a claim, its key in a Secret. The pod takes its copies along, and the one that replaces it has an empty disk."""
    (key := tmp_path / "key").write_bytes(bytes(32))  # the example's
    data = volume(node, "digits-shared", "ReadWriteMany")
    pack = ["data", "pack", "disttrain_trainer.examples.digits:dataset", str(data), "--partitions", "12"]
    command = [sys.executable, "-m", "disttrain.cli.main", *pack, "--key", str(key)]
    subprocess.run(command, check=True, capture_output=True)

    def copied(worker: int) -> list[str]:
        """Copies of the worker's pod: how many it found on its disk, got from other workers, and from the volume, once it has all."""
        log = node.kubectl("logs", f"digits-replicated-worker-{worker}", "-n", TEAM, check=False)
        return re.findall(r"(\d+ were here, \d+ came from other workers, \d+ from the volume)", log)

    with held(node, "digits-replicated.yaml", module="digits", step=16, steps=30) as name:
        node.wait_for("the workers to have their copies", lambda: all(map(copied, range(3))), 120, every=0.5)
        node.kill_pod(TEAM, f"{name}-worker-1")
    status = complete(node, name)
    assert (status["restarts"]["total"], status["restarts"]["last"]["exitCode"]) == (1, 137)
    [copies] = copied(1)  # how many it keeps is another number for each packing
    assert re.fullmatch(r"0 were here, [1-9]\d* came from other workers, 0 from the volume", copies), copies
    assert float(status["training"]["evaluation"]["accuracy"]) > 0.5  # a guess is 0.1


SLOT = "example.com/slot"
"""A resource of which each worker of the elastic job needs one, so that the node has room for as many workers as it offers."""


def test_an_elastic_job_is_scaled_shrinks_where_there_is_no_room_and_grows_back(node: Node) -> None:
    node.offer({SLOT: "3"})
    container = {"name": "trainer", "resources": {"limits": {SLOT: "1"}}}
    name = apply(
        node,
        "digits-elastic.yaml",
        trainer={"maxSteps": 1_000_000, "epochs": None},
        worker={"template": {"spec": {"containers": [container]}}},
        scheduling={"timeoutSeconds": 5},
        observability={"statusIntervalSeconds": 1},
    )

    def trains_with(workers: int, seconds: int = 60) -> None:
        node.wait_for(f"{workers} workers", lambda: training(node, name).get("worldSize") == workers, seconds)

    def scale(workers: int) -> None:
        node.kubectl("scale", f"dtj/{name}", f"--replicas={workers}", "-n", TEAM, user=JANE)

    trains_with(2, 120)
    scale(4)
    trains_with(3)

    def given_up() -> bool:
        job = node.get("dtj", name, namespace=TEAM)
        worker = job["status"]["worker"]
        return "room" in worker and (worker["targetReplicas"], job["spec"]["worker"]["replicas"]) == (3, 4)

    node.wait_for("one to be given up", given_up)  # the room is written first, the target in the next pass
    node.offer({SLOT: "4"})
    trains_with(4, 150)  # the first try comes after 60 s
    scale(1)
    trains_with(1)
    status = node.get("dtj", name, namespace=TEAM)["status"]
    assert "room" not in status["worker"]
    assert "restarts" not in status or status["restarts"]["total"] == 0
    about = f"--field-selector=involvedObject.name={name},reason=Resizing"
    said = node.kubectl("get", "events", "-n", TEAM, about, "-o", "jsonpath={range .items[*]}{.message}{'\\n'}{end}")
    for words in (
        "from 2 to 4 workers",
        "from 4 to 3 workers, as the others find no node",
        "from 3 to 4 workers: there is a node again",
        "from 4 to 1 workers",
    ):
        assert f"Resizing {words}" in said
    node.kubectl("delete", f"dtj/{name}", "-n", TEAM, user=JANE)


def test_a_model_in_tensor_parts_and_one_in_pipeline_stages_train(node: Node) -> None:
    for name in [apply(node, f"charlm-{kind}.yaml", trainer={"maxSteps": 20}) for kind in ("tensor", "pipeline")]:
        status = complete(node, name)
        assert float(status["training"]["evaluation"]["bits_per_character"]) < 5.5, name  # a guess is above 6


def test_the_other_examples_complete_side_by_side(node: Node) -> None:
    language = job_of("charlm-ddp.yaml", "charlm")
    language["spec"]["trainer"]["maxSteps"] = 20  # of 300, which are half a minute of two cores
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=language, user=JANE)
    examples = ["digits-ddp.yaml", "mlp-sync.yaml", "own-model.yaml", "torchrun-script.yaml", "command.yaml"]
    for name in ["charlm", *(apply(node, example) for example in examples)]:
        status = complete(node, name)
        assert status["state"] == "Complete", name
    bits = float(training(node, "charlm")["evaluation"]["bits_per_character"])
    assert bits < 5.5  # a guess among the text's characters is above 6
    # Its model is a file of a ConfigMap beside it; the image is the one of the others.
    assert float(training(node, "own-model")["evaluation"]["accuracy"]) > 0.95


def test_deleting_a_job_leaves_nothing_behind(node: Node) -> None:
    job = job_of("digits-ps.yaml", "gone")
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=job, user=JANE)
    selector = "disttrain.dev/job-name=gone"
    # Not a moment before: a container's first process loses the signals that come before its entrypoint has blocked them.
    for pod in ("gone-master-0", "gone-ps-0", "gone-ps-1", "gone-worker-0", "gone-worker-1"):
        node.wait_for(f"{pod} to start", lambda pod=pod: node.program_of(TEAM, pod).startswith("python"), 60)
    node.kubectl("delete", "dtj", "gone", "-n", TEAM, user=JANE)

    def left(kinds: str = "pods,services,networkpolicies") -> list[Any]:
        items: list[Any] = json.loads(node.kubectl("get", kinds, "-n", TEAM, "-l", selector, "-o", "json"))["items"]
        return items

    def not_deleted() -> list[Any]:
        return [pod for pod in left("pods") if "deletionTimestamp" not in pod["metadata"]]

    node.wait_for(
        "the collector, which looks for new kinds every 30 s, to delete the pods", lambda: not not_deleted(), 60
    )
    # Their processes were just starting, and end at once all the same: not after their grace period of 30 s.
    node.wait_for("everything of the job to be gone", lambda: not left(), 15)


def test_what_a_job_lacks_is_named_in_its_condition(node: Node) -> None:
    secretless, claimless, programless, imageless, volumeless, codeless = (
        job_of("command.yaml", name)
        for name in ("secretless", "claimless", "programless", "imageless", "volumeless", "codeless")
    )
    codeless["spec"]["trainer"]["code"] = {"configMap": "nowhere"}
    env = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "nowhere", "key": "token"}}}]
    secretless["spec"]["worker"]["template"] = {"spec": {"containers": [{"name": "trainer", "env": env}]}}
    claimless["spec"]["checkpoint"] = {"volume": {"persistentVolumeClaim": "nowhere"}}
    programless["spec"]["trainer"]["command"] = ["nowhere"]
    imageless["spec"]["image"] = "registry.invalid/nowhere:1"
    volume = {"name": "token", "secret": {"secretName": "nowhere"}}
    mount = {"name": "trainer", "volumeMounts": [{"name": "token", "mountPath": "/token"}]}
    volumeless["spec"]["worker"]["template"] = {"spec": {"volumes": [volume], "containers": [mount]}}
    jobs = [secretless, claimless, programless, imageless, volumeless, codeless]
    node.kubectl("apply", "-n", TEAM, "-f", "-", input=jobs, user=JANE)

    def condition(name: str, type_: str) -> str:
        conditions = node.get("dtj", name, namespace=TEAM).get("status", {}).get("conditions", [])
        return next((c["message"] for c in conditions if c["type"] == type_ and "nowhere" in c["message"]), "")

    for name, type_, says in [
        ("secretless", "Ready", "create it in the job's namespace"),
        ("claimless", "Scheduled", "create it in the job's namespace"),
        ("programless", "Failed", "(StartError, exit code 127)"),
        ("imageless", "Ready", "check the image's name"),
        ("volumeless", "Ready", "create it in the job's namespace"),
        ("codeless", "Ready", 'configmap "nowhere" not found'),
    ]:
        message = node.wait_for(
            f"{type_} of {name} to name it", lambda name=name, type_=type_: condition(name, type_), 60
        )
        assert says in message, message
        node.kubectl("delete", "dtj", name, "-n", TEAM, user=JANE)


def test_the_operator_may_do_what_it_needs_and_no_more(node: Node) -> None:
    account = "system:serviceaccount:disttrain-system:disttrain-operator"
    for question in [
        "get secrets",
        "list secrets",
        "watch secrets",
        "create pods --subresource=exec",
        "delete namespaces",
        "* *",
    ]:
        answer = node.kubectl("auth", "can-i", *question.split(), "-n", TEAM, f"--as={account}", check=False)
        assert answer.strip() == "no", question
    roles = json.loads(
        node.kubectl("get", "clusterroles,roles", "-A", "-l", "app.kubernetes.io/part-of=disttrain", "-o", "json")
    )
    rules = [rule for role in roles["items"] for rule in role["rules"] or []]
    assert rules
    assert not any(
        "*" in word for rule in rules for key in ("verbs", "resources", "apiGroups") for word in rule.get(key, [])
    )
