"""The user's code, by name: "package.module:callable", found on the current folder first, called with checked results.

What a name cannot be resolved to is WrongInput, one line. What the user's code raises passes through as it is. Not here: training.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain_trainer.errors import WrongInput


def add_current_folder() -> None:
    """Lets factories be imported from the current folder, before any installed package."""
    here = str(Path.cwd())
    if here not in sys.path[:1]:
        sys.path.insert(0, here)


def resolve(field: str, name: str, *arguments: str) -> Callable[..., Any]:
    """The callable that a field of the job names. arguments: what it is going to be called with, by the names that we give them.

    Raises WrongInput, or what the module raises while it is imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise WrongInput(f"{field}: {name!r} is no factory; expected package.module:callable")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module itself or a package on the way to it; any other missing module is the user's module's own import.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise WrongInput(
            f"{field}: {name!r}: there is no module {error.name!r} in {Path.cwd()} or the installed packages; "
            "put its file there, or install it in the image"
        ) from None
    if not hasattr(module, attribute):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"define it in {module.__file__}"
        raise WrongInput(f"{field}: {name!r}: module {module_name} has no {attribute!r}; {hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise WrongInput(f"{field}: {name!r} is a {type(found).__name__}; expected a function")
    if arguments:
        _check_signature(found, arguments, f"{field}: {name!r}", attribute)
    return found  # type: ignore[no-any-return]


def place_of(function: Callable[..., Any]) -> str:
    """Where the user's function is defined, such as " (mine.py:12)", to stand at the end of a message; "" when Python does not know."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""


def _check_signature(found: Callable[..., Any], arguments: tuple[str, ...], what: str, attribute: str) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # not every built-in has one
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        call = f"{attribute}({', '.join(arguments)})"
        raise WrongInput(f"{what} is defined as {attribute}{signature}, but is called as {call}: {error}") from None
