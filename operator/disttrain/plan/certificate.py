"""The Secret with the certificate of an attempt, for network.tls Mutual: pods are created after it, and it goes with the attempt.

The operator has no right to read Secrets. What it must know of one is in status.certificate, which is stored in these steps:

| status.certificate | what follows |
|---|---|
| none, or of another attempt | the Secret of that attempt is deleted; a random suffix for the name of a new one is stored |
| a suffix | the Secret is created. Its name is taken: it is deleted, and another suffix is stored |
| suffix and uid | pods are created. The Secret is never created again in this attempt: two certificates of one attempt refuse each other |

A name that is taken is that of a Secret whose creation was not stored, because the operator was lost in between; or one who reads the
status was faster. No pod has it in either case.
"""

from disttrain.api.policies import Tls
from disttrain.api.status import CertificateStatus
from disttrain.plan.model import CreateSecret, DeleteSecret
from disttrain.plan.step import Step
from disttrain.plan.view import JobView

AWAITED = ("certificate",)
"""Fields of the status for which the next step waits: no schema may drop them."""


def before_pods(view: JobView) -> Step | None:
    """What has to be done before pods are created; None: nothing."""
    if view.spec.network.tls is not Tls.MUTUAL or view.snapshot.keeps_certificates:
        return None
    kept, made = view.status.certificate, view.snapshot.secret
    if kept is None or kept.attempt != view.attempt or (kept.uid is None and made is not None and not made.uid):
        fresh = CertificateStatus(attempt=view.attempt, suffix=view.snapshot.random_suffix)
        return Step(actions=spent(view), status={"certificate": fresh}, again=True)
    if kept.uid is not None:
        return None
    if made is None:
        return Step(actions=(CreateSecret(),))
    stored = kept.model_copy(update={"uid": made.uid, "public_key": made.public_key})
    return Step(status={"certificate": stored}, again=True)


def spent(view: JobView) -> tuple[DeleteSecret, ...]:
    """The deletion of the Secret, where no pod needs it any more."""
    return (DeleteSecret(),) if view.status.certificate is not None else ()
