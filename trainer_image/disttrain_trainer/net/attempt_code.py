"""Which code this attempt trains with: that of the first worker, by its digest. A worker with other code is not admitted.

Without it, a pod that is replaced after its ConfigMap was edited would train another model than its peers. Not here: what follows for
the job (the worker's exit code 2, and the failure policy).
"""

from disttrain_trainer.net.incoming import Hello


class AttemptCode:
    """The digest that the workers of the attempt share.

    A master that is replaced in the middle of an attempt knows nothing: there a worker that an earlier master had admitted decides.
    """

    def __init__(self, origin: str | None) -> None:
        self._origin = origin
        self._digest: str | None = None
        self._certain = False

    def take(self, hello: Hello) -> bool:
        """Learns from a worker's first words; whether the attempt's code is another one now than it seemed before."""
        if hello.code is None or (self._digest is not None and (self._certain or not hello.code_admitted)):
            return False
        changed = self._digest not in (None, hello.code)
        self._digest, self._certain = hello.code, hello.code_admitted
        return changed

    def objection(self, who: str, digest: str | None) -> str | None:
        """Why a worker with this code cannot train with the others, None when it can."""
        if digest is None or self._digest in (None, digest):  # None: a trainer of an earlier release does not say
            return None
        return (
            f"trainer.code of {who} is not that of this attempt (sha256 {digest[:12]}, not {self._digest[:12]}): {self._origin} was "
            "changed while the job runs; undo the change, or create a new job"
        )
