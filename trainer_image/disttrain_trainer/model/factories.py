"""The user's code, by name: "package.module:callable", found on the current folder first, called with checked results.

What a name cannot be resolved to is WrongInput, one line. What the user's code raises passes through as it is.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disttrain.api import environment
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.runtime import logs

log = logs.get_logger(__name__)


def add_current_folder() -> None:
    """Lets factories be imported from the current folder, before any installed package."""
    here = Path.cwd()
    if str(here) not in sys.path[:1]:
        sys.path.insert(0, str(here))
    if hidden := hidden_files(here):
        names = ", ".join(file.name for file in hidden)
        log.warning(
            "%s in %s: another module of that name was imported first, and `import` gives that one; rename the file if yours is meant",
            names,
            here,
        )


def hidden_files(folder: Path) -> list[Path]:
    """Files and packages of a folder that have the name of a module which this process has imported from elsewhere, such as random.py."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [entry for entry in entries if (name := _importable(entry)) and _is_from_elsewhere(name, folder)]


def _importable(entry: Path) -> str:
    """The name under which `import` finds a file or package, "" for none."""
    if entry.suffix == ".py":
        return entry.stem
    return entry.name if (entry / "__init__.py").is_file() else ""


def _is_from_elsewhere(name: str, folder: Path) -> bool:
    if name == "__main__" or name not in sys.modules:
        return False
    file = getattr(sys.modules[name], "__file__", None)
    return file is None or folder.resolve() not in Path(file).resolve().parents


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
        if module_name.endswith(".py"):
            right = module_name.removesuffix(".py")
            raise WrongInput(f"{field}: {name!r} names a file; write the module, {right}:{attribute}") from None
        places = f"trainer.code, {Path.cwd()}" if environment.CODE_DIR in os.environ else str(Path.cwd())
        raise WrongInput(
            f"{field}: {name!r}: there is no module {error.name!r} in {places} or the installed packages; "
            "put its file there, or install it in the image"
        ) from None
    if not hasattr(module, attribute):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"define it in {getattr(module, '__file__', module_name)}"
        own = Path.cwd() / f"{module_name.partition('.')[0]}.py"
        if own in hidden_files(Path.cwd()):
            hint = f"{own} has the name of a module that Python or a library of the trainer uses; rename it"
        raise WrongInput(f"{field}: {name!r}: module {module_name} has no {attribute!r}; {hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise WrongInput(f"{field}: {name!r} is a {type(found).__name__}; expected a function")
    if arguments:
        check_signature(found, arguments, f"{field}: {name!r}", attribute)
    return found  # type: ignore[no-any-return]


def place_of(function: Callable[..., Any]) -> str:
    """Where the user's function is defined, such as " (mine.py:12)", to stand at the end of a message; "" when Python does not know."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""


def check_signature(found: Callable[..., Any], arguments: tuple[str, ...], what: str, attribute: str) -> None:
    """Raises WrongInput when a callable cannot be called with these arguments, by the names that we give them. what: whose it is."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # not every built-in has one
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        call = f"{attribute}({', '.join(arguments)})"
        raise WrongInput(f"{what} is defined as {attribute}{signature}, but is called as {call}: {error}") from None
