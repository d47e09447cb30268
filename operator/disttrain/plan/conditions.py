"""What is seen of the pods and of the master's report, as the eight conditions. Transition times are kept while a status stays.

A policy's own claims stand above what is seen here (report.py). Not here: the one word for the column (state.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from disttrain.api.reasons import ConditionType, Reason
from disttrain.api.status import Condition
from disttrain.plan import children, gang, words
from disttrain.plan.model import Phase, PodView
from disttrain.plan.progressing import progressing
from disttrain.plan.restarting import restarting
from disttrain.plan.step import Claim, Truth
from disttrain.plan.validity import idle_workers
from disttrain.plan.view import REPORT_TIMEOUT, JobView

NO_PLACE_FOR_MODEL = "The trained model will be lost, because the job has no volume for it; set spec.checkpoint.volume"
LONGEST = 4096
"""Characters of a message: an Event and a terminal want no more, and the API no more than 32768."""

_IMAGE_REASONS = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
)
_CONFIG_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_CRASH_LOOP = "CrashLoopBackOff"
_MISSING: Mapping[str, Reason] = MappingProxyType(
    {
        "secret": Reason.SECRET_NOT_FOUND,
        "configmap": Reason.CONFIG_MAP_NOT_FOUND,
        "persistentvolumeclaim": Reason.CLAIM_NOT_FOUND,
    }
)
_MULTI_ATTACH = "Multi-Attach error"
"""Beginning of the attach-detach controller's message about a ReadWriteOnce claim whose pods have different nodes."""
_IN_NAMESPACE = "create it in the job's namespace, or correct the name in the job"
_REMEDIES: Mapping[Reason, str] = MappingProxyType(
    {
        Reason.SECRET_NOT_FOUND: _IN_NAMESPACE,
        Reason.CONFIG_MAP_NOT_FOUND: _IN_NAMESPACE,
        Reason.CLAIM_NOT_FOUND: _IN_NAMESPACE,
        Reason.VOLUME_IN_USE: "one node at a time may have it: use a claim with access mode ReadWriteMany, "
        "or keep all pods of the job on one node by nodeSelector",
        Reason.IMAGE_PULL: "check the image's name, and whether its registry wants an imagePullSecret",
    }
)
_CERTIFICATE = re.compile(r"-tls-[0-9]+-[0-9a-f]{16}\b")
"""In the name of the Secret that the operator makes for network.tls Mutual (names.secret_name)."""
_DELETED_CERTIFICATE = (
    "it was the certificate of this attempt and was deleted; "
    "set spec.suspend to true and back: the next attempt has a new one"
)


def observe(view: JobView) -> tuple[Claim, ...]:
    """The eight conditions as they are seen."""
    seen_ready = _with_trouble(view, ready(view))
    seen_progress = progressing(view, seen_ready)
    return (
        _valid(view),
        _suspended(view),
        _scheduled(view),
        seen_ready,
        seen_progress,
        restarting(view, seen_ready, seen_progress),
        Claim(type=ConditionType.COMPLETE, status="False", reason=Reason.IN_PROGRESS),
        Claim(type=ConditionType.FAILED, status="False", reason=Reason.IN_PROGRESS),
    )


def sidecar_trouble(view: JobView) -> str:
    """Which container beside a trainer is in trouble, "" for none. It does not stop a training; a user has to know."""
    for slot in view.wanted:
        pod = view.present.get(slot)
        if pod is None or pod.done or pod.deleting or (trouble := pod.trouble) is None:
            continue
        if (trouble.since is None or view.reached(trouble.since)) and (
            trouble.until is None or not view.reached(trouble.until)
        ):
            hint = view.snapshot.log_hint.format(namespace=view.job.metadata.namespace, pod=pod.name)
            return f"Container {trouble.container} of pod {pod.name}: {trouble.words[:1024]}; log: {hint} -c {trouble.container}"
    return ""


def _with_trouble(view: JobView, ready: Claim) -> Claim:
    if not (trouble := sidecar_trouble(view)):
        return ready
    message = f"{ready.message[: LONGEST - len(trouble) - 2]}. {trouble}" if ready.message else trouble
    return replace(ready, message=message)


def merge(view: JobView, claims: Iterable[Claim]) -> tuple[Condition, ...]:
    """The conditions to store. The time changes only with the status, as the API conventions have it. One that nothing is claimed of
    is kept: another version knows what it means."""
    claims = tuple(claims)
    claimed = {claim.type.value for claim in claims}
    merged = []
    generation = view.job.metadata.generation
    for claim in claims:
        before = view.status.condition(claim.type)
        reason, message = str(claim.reason), claim.message[:LONGEST]
        now = (claim.status, reason, message, generation)
        if before is not None and now == (before.status, before.reason, before.message, before.observed_generation):
            merged.append(before)
            continue
        merged.append(
            Condition(
                type=claim.type.value,
                status=claim.status,
                reason=reason,
                message=message,
                last_transition_time=before.last_transition_time
                if before is not None and before.status == claim.status
                else view.second,
                observed_generation=generation,
            )
        )
    return (*merged, *(condition for condition in view.status.conditions if condition.type not in claimed))


def _valid(view: JobView) -> Claim:
    if why := children.blocked(view):
        return _claim(ConditionType.VALID, "False", children.blocked_reason(view), why)
    spec = view.spec
    no_place = view.runs_our_loop and spec.checkpoint is None and not view.snapshot.local
    doubts = (NO_PLACE_FOR_MODEL if no_place else "", idle_workers(spec, view.status.parts_per_step))
    return _claim(ConditionType.VALID, "True", Reason.ACCEPTED, ". ".join(filter(None, doubts)))


def _suspended(view: JobView) -> Claim:
    before = view.status.condition(ConditionType.SUSPENDED)
    if before is not None and before.reason == Reason.RESUMED:
        return _claim(ConditionType.SUSPENDED, "False", Reason.RESUMED, before.message)
    return _claim(ConditionType.SUSPENDED, "False", Reason.NOT_SUSPENDED)


def _scheduled(view: JobView) -> Claim:
    pods = [view.present.get(slot) for slot in view.expected if not view.needs_no_pod(slot)]
    without_node = [pod for pod in pods if pod is None or not (pod.scheduled or pod.done)]
    if not without_node:
        return _claim(ConditionType.SCHEDULED, "True", Reason.ALL_PODS_SCHEDULED)
    if gang.is_backing_off(view) and (before := view.status.condition(ConditionType.SCHEDULED)) is not None:
        return _claim(ConditionType.SCHEDULED, "False", before.reason, before.message)
    if former := view.snapshot.former:
        message = f"Waiting until the objects of a deleted job of this name are gone: {', '.join(former)}"
        return _claim(ConditionType.SCHEDULED, "False", Reason.FORMER_JOB, message)
    if refusal := children.retryable_refusal(view):
        return _claim(ConditionType.SCHEDULED, "False", Reason.POD_REFUSED, f"{refusal.name}: {refusal.message}")
    for pod in without_node:
        if pod is not None and pod.reason == Reason.UNSCHEDULABLE:
            if gang.incomplete(view):
                return _claim(ConditionType.SCHEDULED, "False", Reason.WAITING_FOR_GANG, gang.sentence(view))
            reason = _missing(pod.message) or Reason.UNSCHEDULABLE
            return _claim(ConditionType.SCHEDULED, "False", reason, _what_is_wrong(pod, reason))
    if not gang.admitted(view):
        return _claim(ConditionType.SCHEDULED, "False", Reason.WAITING_FOR_GANG, gang.not_admitted(view))
    made = any(pod is not None for pod in without_node)
    return _claim(
        ConditionType.SCHEDULED, "False", Reason.SCHEDULING, "Waiting for nodes" if made else "Creating the pods"
    )


def ready(view: JobView) -> Claim:
    """Whether every pod runs and the peers found one another."""
    if view.silent:
        return _claim(ConditionType.READY, "False", Reason.NODE_LOST, words.node_lost(view.silent[0]))
    waiting: list[PodView] = []
    for slot in view.expected:
        pod = view.present.get(slot)
        if view.needs_no_pod(slot) or (
            pod is not None and not pod.deleting and (pod.ready or pod.phase is Phase.SUCCEEDED)
        ):
            continue
        if pod is None or pod.done or pod.deleting:
            return _claim(ConditionType.READY, "False", Reason.STARTING, f"Waiting for pod {view.name(slot)}")
        waiting.append(pod)
    if waiting:
        # A pod that cannot start comes before pods that are merely starting.
        failing = next((claim for pod in waiting if (claim := _cannot_start(pod)) is not None), None)
        return failing or _claim(ConditionType.READY, "False", Reason.STARTING, f"Waiting for pod {waiting[0].name}")
    progress = view.progress
    if progress is not None and progress.waiting_for and not _met(view):
        message = f"Waiting for {words.without_clock(progress.waiting_for)}"
        return _claim(ConditionType.READY, "False", Reason.WAITING_FOR_PEERS, message)
    if _about_to_report(view):
        message = "Every pod runs; the master has not reported yet"
        return _claim(ConditionType.READY, "False", Reason.WAITING_FOR_PEERS, message)
    return _claim(ConditionType.READY, "True", Reason.ALL_PODS_READY)


def _met(view: JobView) -> bool:
    """Whether the peers had found one another. A step that takes long is no new search for peers."""
    progressing = view.status.condition(ConditionType.PROGRESSING)
    if progressing is None or progressing.status == "True":
        return progressing is not None
    return view.status.is_true(ConditionType.READY) and progressing.reason in (Reason.NO_STEP, Reason.STALLED)


def _about_to_report(view: JobView) -> bool:
    """Whether the first report of the attempt may still come. Only the master knows whether the peers of our loop found one another;
    but an operator that cannot read it must not wait for ever."""
    progressing = view.status.condition(ConditionType.PROGRESSING)
    reported = view.progress is not None or (progressing is not None and progressing.status != "False")
    if not view.runs_our_loop or reported or view.status.is_true(ConditionType.READY):
        return False
    moments = [view.until(pod.ready_since or pod.created, REPORT_TIMEOUT) for pod in view.present.values() if pod.ready]
    if view.snapshot.listening_since is not None:
        moments.append(view.snapshot.listening_since + REPORT_TIMEOUT)
    return not view.reached(max(moments, default=view.now))


def _cannot_start(pod: PodView) -> Claim | None:
    if pod.reason in _IMAGE_REASONS:
        reason = Reason.IMAGE_PULL
    elif pod.reason == _CRASH_LOOP:
        reason = Reason.SIDECAR_FAILING  # the trainer itself is never restarted in its pod
    elif pod.reason in _CONFIG_REASONS:
        attached = Reason.VOLUME_IN_USE if _MULTI_ATTACH in pod.message else None
        reason = attached or _missing(pod.message) or Reason.CONTAINER_CONFIG
    else:
        return None
    return _claim(ConditionType.READY, "False", reason, _what_is_wrong(pod, reason))


def _what_is_wrong(pod: PodView, reason: Reason) -> str:
    """Why the pod does not start, and what to do."""
    text = f"{pod.name}: {pod.message or pod.reason}"
    if reason is Reason.SECRET_NOT_FOUND and _CERTIFICATE.search(text):
        return f"{text}; {_DELETED_CERTIFICATE}"
    return f"{text}; {_REMEDIES[reason]}" if reason in _REMEDIES else text


def _missing(message: str) -> Reason | None:
    """Which kind of object a message says is not found."""
    lower = message.lower()
    if "not found" not in lower:
        return None
    return next((reason for kind, reason in _MISSING.items() if kind in lower), None)


def _claim(type_: ConditionType, status: Truth, reason: str, message: str = "") -> Claim:
    return Claim(type=type_, status=status, reason=reason, message=message)
