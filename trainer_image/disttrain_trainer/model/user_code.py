"""What user code must not do to our process, and must not leave behind in it: docs/design/0004-user-code.md has the whole list."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from disttrain_trainer.errors import OwnGroup, WrongInput
from disttrain_trainer.runtime import logs, machine
from disttrain_trainer.runtime.termination import of_user_error

log = logs.get_logger(__name__)

_NAME = "init_process_group"
_original = dist.init_process_group
_running: list[str] = []
"""The fields whose code runs, the innermost last."""
_warned: set[str] = set()
"""The fields whose code has set a handler of SIGTERM: a loss may do so in every step."""


@contextmanager
def guarded(field: str) -> Iterator[None]:
    """Runs code of the user's, which `field` of the job names, in the main thread. Afterwards SIGTERM and autograd are ours again.

    Raises OwnGroup. Random state and logging are taken care of elsewhere.
    """
    before, autograd = dist.is_initialized(), torch.is_grad_enabled()
    try:
        with refusing_groups(field):
            try:
                yield
            except BaseException as error:
                machine.leave_forked_child(error)
                raise
            machine.leave_forked_child()
    except ValueError as error:
        if "Default process group has not been initialized" not in str(error):
            raise
        where = of_user_error(error)[1].where
        raise WrongInput(
            f"{field} uses torch's default process group ({where}), which DistTrain makes later and for its own loop: return the model and "
            "the data as for one process, without DistributedDataParallel or DistributedSampler, or run the program as trainer.script"
        ) from None
    finally:
        torch.set_grad_enabled(autograd)
        keep_sigterm(field)
    if dist.is_initialized() and not before:
        raise OwnGroup(field)


@contextmanager
def refusing_groups(field: str) -> Iterator[None]:
    """Where user code runs that makes no process group: the call raises OwnGroup, by all names that it has in torch.

    A training loop enters this once; who calls which code of the user's there knows the field better, see OwnGroup.by.
    """
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("torch.distributed") and getattr(module, _NAME, None) is _original
    ]
    for module in modules:
        setattr(module, _NAME, _refuse)
    _running.append(field)
    try:
        yield
    finally:
        _running.pop()
        for module in modules:
            setattr(module, _NAME, _original)


def keep_sigterm(field: str) -> None:
    """Takes back a handler of SIGTERM that user code has set, and says so once. Call it from the main thread."""
    if machine.restore_sigterm() and field not in _warned:
        _warned.add(field)
        log.warning(
            "%s replaces the handler of SIGTERM, with which a worker saves before it ends; it is put back", field
        )


def _refuse(*arguments: Any, **keywords: Any) -> None:
    """In place of torch's function; a module that user code imports meanwhile keeps it."""
    if not _running:
        return _original(*arguments, **keywords)
    caller = next(
        frame for frame in reversed(traceback.extract_stack()[:-1]) if "/torch/distributed/" not in frame.filename
    )
    raise OwnGroup(_running[-1], f" ({caller.filename}:{caller.lineno})")
