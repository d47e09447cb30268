"""What goes wrong in a life of the simulation: each fault once, at a request, at a moment, or at a watch."""

import random
from dataclasses import dataclass
from enum import StrEnum

from disttrain.kube.api import JOBS, NETWORK_POLICIES, PODS, SERVICES, Conflict, Refused, Resource, Unavailable

WATCHED: tuple[Resource, ...] = (JOBS, PODS, SERVICES, NETWORK_POLICIES)


class Kind(StrEnum):
    """Kinds of faults. At a request:"""

    CRASH_BEFORE = "the process dies before the request is sent"
    CRASH_AFTER = "the process dies before the answer arrives"
    REPLY_LOST = "the request is carried out and not answered"
    CONFLICT = "409"
    EXPIRED = "410"
    INVALID = "422"
    TOO_MANY = "429"
    SERVER_ERROR = "500"
    LATE = "the request arrives after its time-out"
    SLOW = "the answer takes seconds"
    # At a list:
    OLDER_LIST = "a list is older than the cache"
    # At a watch:
    DROP = "events are lost"
    DELAY = "events come late"
    DUPLICATE = "events come twice"
    REPLAY = "the watch begins again at an older version"
    MUTE = "the watch reports nothing, and lists again after its time-out"
    GONE = "the watch lists again (410)"
    # At a process, when it is about to send a request:
    FREEZE = "the process is frozen, and sends it when it goes on"
    OVERLAP = "another operator acts beside it from here on for some seconds"
    # At the API server:
    RESTORE = "it is restored from a backup"
    NEWER_SCHEMA = "its CRD is of a later release"
    OLDER_SCHEMA = "its CRD is of an earlier release"


AT_A_REQUEST = tuple(Kind)[: tuple(Kind).index(Kind.OLDER_LIST)]
AT_A_WATCH = (Kind.DROP, Kind.DELAY, Kind.DUPLICATE, Kind.REPLAY, Kind.MUTE, Kind.GONE)
AT_A_PROCESS = (Kind.FREEZE, Kind.OVERLAP)
ERRORS = {
    Kind.CONFLICT: lambda: Conflict(409, "Conflict", "planned"),
    Kind.EXPIRED: lambda: Refused(410, "Expired", "planned"),
    Kind.INVALID: lambda: Refused(422, "Invalid", "planned"),
    Kind.TOO_MANY: lambda: Unavailable(429, "TooManyRequests", "planned", retry_after=2.0),
    Kind.SERVER_ERROR: lambda: Unavailable(500, "InternalError", "planned"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    kind: Kind
    at: int
    """The number of the request or of the list, or the second."""
    seconds: float = 0.0
    """How long it lasts, or how far it goes back."""
    resource: Resource | None = None
    """Of a watch."""

    def __str__(self) -> str:
        where = f" ({self.resource.plural})" if self.resource is not None else ""
        unit = (
            "request"
            if self.kind in (*AT_A_REQUEST, *AT_A_PROCESS)
            else "list"
            if self.kind is Kind.OLDER_LIST
            else "second"
        )
        return f"at {unit} {self.at}, {self.seconds:.1f} s: {self.kind}{where}"


def draw(choices: random.Random) -> tuple[Fault, ...]:
    """One to three faults."""
    return tuple(_one(choices) for _ in range(choices.choice((1, 1, 1, 2, 2, 3))))


def _one(choices: random.Random) -> Fault:
    seconds = choices.choice((0.5, 2.0, 6.0, 20.0))
    request, moment = choices.randrange(4, 56), choices.choice((12, 25, 60)) * choices.random()
    match choices.randrange(10):
        case 0 | 1 | 2 | 3:
            return Fault(choices.choice(AT_A_REQUEST), request, seconds)
        case 4:
            return Fault(Kind.OLDER_LIST, choices.randrange(4, 12), float(choices.randrange(1, 30)))
        case 5 | 6:
            return Fault(choices.choice(AT_A_WATCH), int(moment), seconds, choices.choice((PODS, PODS, *WATCHED)))
        case 7 | 8:
            return choices.choice(
                (
                    Fault(Kind.FREEZE, request, choices.choice((4.0, 18.0, 25.0))),
                    Fault(Kind.OVERLAP, request, choices.choice((1.0, 4.0))),
                )
            )
    kind = choices.choice((Kind.RESTORE, Kind.NEWER_SCHEMA, Kind.OLDER_SCHEMA))
    return Fault(kind, 1 + int(moment), seconds)
