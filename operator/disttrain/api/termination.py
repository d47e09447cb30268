"""The termination message of a training process, as JSON: what a pod says last."""

from pydantic_core import from_json

from disttrain.api.base import Model
from disttrain.api.reading import read
from disttrain.api.runtime import STEP, Progress, RestartsInPlace


def utf8(text: str) -> str:
    """A text of user code's without what UTF-8 cannot hold: lone surrogates, as in the names of files, would make a report unwritable."""
    return text.encode(errors="replace").decode()


_MOST_BYTES = 4096
"""Of a termination message, which the kubelet keeps."""


class Termination(Model):
    """The termination message of a training process, at most 4096 bytes of JSON."""

    message: str = ""
    """The message: for a failure the exception's last line, or what the wait was for."""
    where: str = ""
    """For a failure of the user's code: file and line."""
    progress: Progress | None = None
    """The master's last report of the progress."""
    done: bool = False
    """The process ended because the job is done. Exit code 0 alone does not say so: any library may call exit(0)."""
    restarts_in_place: RestartsInPlace | None = None
    """Those of this pod."""

    def encode(self) -> str:
        """JSON within the 4096 bytes that the kubelet keeps: of a report the oldest restarts in place are left out (each pod's own message
        has its own), a long message is cut in the middle, and what the progress says beside numbers is left out where it must be. The
        rest would be cut off, and what is no JSON says nothing at all."""
        text = self._json()
        if (size := len(text.encode())) <= _MOST_BYTES:
            return text
        if self.progress is not None and self.progress.restarts_in_place:
            fewer = self.progress.restarts_in_place[: len(self.progress.restarts_in_place) // 2]
            progress = self.progress.model_copy(update={"restarts_in_place": fewer})
            return self.model_copy(update={"progress": progress}).encode()
        half = max(0, len(self.message) - (size - _MOST_BYTES + 96)) // 2
        short = f"{self.message[:half]} … {self.message[len(self.message) - half :]}" if half else ""
        said = self.model_copy(update={"message": short, "where": self.where[:256]})
        for field in ("resumed", "waiting_for", "evaluation", "values", "warning", "nan_loss", "model"):
            if said.progress is None or len(said._json().encode()) <= _MOST_BYTES:
                break
            said = said.model_copy(update={"progress": said.progress.model_copy(update={field: None})})
        return said._json()

    def _json(self) -> str:
        said = self.model_copy(update={"message": utf8(self.message), "where": utf8(self.where)})
        return said.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def decode(cls, text: str) -> "Termination":
        """What a pod's termination message says; a text that is not ours (a user's program) is kept as the message."""
        try:
            data = from_json(text)
            found = read(cls, data)
        except ValueError:
            return cls(message=text.strip())
        if data.keys().isdisjoint(cls.model_fields):  # JSON, and nothing of ours in it
            return cls(message=text.strip())
        said = found.value
        if f"progress.{STEP}" in found.unreadable:
            said = said.model_copy(update={"progress": None})
        if "done" not in data and not said.message:
            # A trainer of an older version left a message without words exactly when the job was done.
            said = said.model_copy(update={"done": True})
        return said
