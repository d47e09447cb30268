"""What user code must not leave behind in our process when a factory returns: docs/design/0004-user-code.md has the whole list.

Not here: importing it (factories.py), its log settings (logs.py), how the process ends (run_script.py).
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from disttrain_trainer import logs, machine
from disttrain_trainer.errors import WrongInput

log = logs.get_logger(__name__)

_MODULES = (dist, distributed_c10d)
"""Where programs find `init_process_group`."""


@contextmanager
def guarded(field: str) -> Iterator[None]:
    """Runs code of the user's, which `field` of the job names, in the main thread. Afterwards SIGTERM and autograd are ours again.

    Raises WrongInput when it makes torch's default process group: DistTrain makes that one, in every round again, and the store at
    MASTER_PORT is the master's. Random state and logging are taken care of elsewhere.
    """

    def refuse(*_: object, **__: object) -> NoReturn:
        caller = traceback.extract_stack(limit=2)[0]
        raise _own_group(field, f" ({caller.filename}:{caller.lineno})")

    before, autograd = dist.is_initialized(), torch.is_grad_enabled()
    original = dist.init_process_group
    for module in _MODULES:
        setattr(module, "init_process_group", refuse)  # noqa: B010 - mypy refuses the assignment
    try:
        yield
    finally:
        for module in _MODULES:
            setattr(module, "init_process_group", original)  # noqa: B010
        torch.set_grad_enabled(autograd)
        if machine.restore_sigterm():
            log.warning(
                "%s replaces the handler of SIGTERM, with which a worker saves before it ends; it is put back", field
            )
    if dist.is_initialized() and not before:
        raise _own_group(field, "")


def _own_group(field: str, where: str) -> WrongInput:
    return WrongInput(
        f"{field} calls torch.distributed.init_process_group{where}, but DistTrain makes the process group of its own loop: "
        "remove the call, or run the program as trainer.script"
    )
