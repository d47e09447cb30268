"""`disttrain completion SHELL`: a script by which the shell completes verbs, options, their values, runs and files.

Made of the arguments themselves (tools.py, main.py), so that it knows what the command knows. Completing starts no Python: the script holds
every word, and the shell finds files and runs.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

SHELLS: Final = ("bash", "zsh", "fish")
_RUNS: Final = ("RUN", "RUN2", "RUN|JOB", "FOLDER|RUN")
"""Arguments that name a run: folders of .disttrain/runs."""
_FILES: Final = ("FILE", "OUT", "FOLDER|RUN")
_FOLDERS: Final = ("DIR",)


@dataclass(frozen=True, slots=True)
class Option:
    """One that a verb takes."""

    names: tuple[str, ...]
    about: str
    takes: str | None
    """What its value is, as --help names it; None: it has none."""
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb and what may follow it."""

    name: str
    about: str
    options: tuple[Option, ...]
    arguments: tuple[str, ...]
    """What they are, as --help names them."""
    values: tuple[str, ...] = ()
    """Words that its argument may be."""

    def names(self, what: Sequence[str]) -> bool:
        """Whether one of its arguments is such."""
        return any(argument in what for argument in self.arguments)


def completion(shell: str, parser: argparse.ArgumentParser) -> int:
    """Prints the script; 0."""
    print(_SCRIPTS[shell](verbs_of(parser)), end="")
    return 0


def verbs_of(parser: argparse.ArgumentParser) -> list[Verb]:
    """What the command can do. A verb below another, as data pack, has the name `data pack`."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            abouts = {one.dest: one.help or "" for one in action._choices_actions}
            for name, child in action.choices.items():
                below = verbs_of(child)
                found.append(_verb(name, abouts.get(name, ""), child, [one.name for one in below]))
                found += [
                    Verb(f"{name} {one.name}", one.about, one.options, one.arguments, one.values) for one in below
                ]
    return found


def _verb(name: str, about: str, parser: argparse.ArgumentParser, below: Sequence[str]) -> Verb:
    options, arguments, values = [], [], list(below)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        choices = tuple(map(str, action.choices or ()))
        shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        if action.option_strings:
            takes = None if action.nargs == 0 else shown
            options.append(Option(tuple(action.option_strings), _plain(action.help or ""), takes, choices))
        else:
            arguments.append(shown)
            values += choices
    return Verb(name, _plain(about), tuple(options), tuple(arguments), tuple(values))


def _plain(text: str) -> str:
    """A help text of which no character means something to a shell."""
    return re.sub(r"[^A-Za-z0-9 ,.;=()/_-]", "", text)


def _bash(verbs: Sequence[Verb]) -> str:
    words = " ".join(verb.name for verb in verbs if " " not in verb.name)
    below = "|".join(f'"{verb.name}"' for verb in verbs if " " in verb.name)
    cases = "".join(
        f'    "{verb.name}") words="{" ".join([*(n for o in verb.options for n in o.names), *verb.values])}"; '
        f"files={int(verb.names(_FILES))}; runs={int(verb.names(_RUNS))} ;;\n"
        for verb in verbs
    )
    return f"""\
# bash completion of disttrain: source <(disttrain completion bash)
_disttrain() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} words="" files=0 runs=0
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{words} --help" -- "$current")); return
  fi
  case "$verb ${{COMP_WORDS[2]}}" in
    {below or "-"}) [ "$COMP_CWORD" -gt 2 ] && verb="$verb ${{COMP_WORDS[2]}}" ;;
  esac
  case "$verb $before" in
{_bash_values(verbs)}  esac
  case "$verb" in
{cases}  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [ "$runs" -eq 1 ] && COMPREPLY+=($(cd .disttrain/runs 2>/dev/null && compgen -d -- "$current"))
  if [ "$files" -eq 1 ] && [ "${{current:0:1}}" != - ]; then
    compopt -o filenames 2>/dev/null
    COMPREPLY+=($(compgen -f -- "$current"))
  fi
  return 0
}}
complete -F _disttrain disttrain
"""


def _bash_values(verbs: Sequence[Verb]) -> str:
    lines = []
    for verb in verbs:
        for option in verb.options:
            if option.takes is None:
                continue
            names = "|".join(f'"{verb.name} {name}"' for name in option.names)
            how = f'-W "{" ".join(option.values)}"' if option.values else "-d" if option.takes in _FOLDERS else "-f"
            found = f'COMPREPLY=($(compgen {how} -- "$current")); ' if option.values or _is_path(option.takes) else ""
            lines.append(f"    {names}) {found}return ;;\n")
    return "".join(lines)


def _zsh(verbs: Sequence[Verb]) -> str:
    tops = [verb for verb in verbs if " " not in verb.name]
    listed = "\n".join(f"    '{verb.name}:{verb.about}'" for verb in tops)
    cases = "\n".join(f"    {verb.name}) _arguments {_zsh_arguments(verb, verbs)} ;;" for verb in tops)
    return f"""\
#compdef disttrain
# zsh completion of disttrain: source <(disttrain completion zsh), or as a file _disttrain in a folder of $fpath
_disttrain_runs() {{ local -a runs; runs=(.disttrain/runs/*(N/:t)); compadd -a runs; _files }}
_disttrain() {{
  local -a verbs; verbs=(
{listed}
  )
  if (( CURRENT == 2 )); then _describe verb verbs; return; fi
  local verb=$words[2]
  shift words; (( CURRENT-- ))
  case $verb in
{cases}
  esac
}}
if [ "$funcstack[1]" = _disttrain ]; then _disttrain "$@"; else compdef _disttrain disttrain; fi
"""


def _zsh_arguments(verb: Verb, verbs: Sequence[Verb]) -> str:
    parts = []
    of_below = [one for one in verbs if one.name.startswith(f"{verb.name} ")]
    for option in dict.fromkeys(option for one in (verb, *of_below) for option in one.options):
        value = ""
        if option.takes is not None:
            action = f"({' '.join(option.values)})" if option.values else "_files" if _is_path(option.takes) else " "
            value = f":{_plain(option.takes)}:{action}"
        parts += [f"'{name}[{option.about}]{value}'" for name in option.names]
    action = "_disttrain_runs" if verb.names(_RUNS) else "_files" if verb.names(_FILES) or of_below else " "
    parts += [f"'1:argument:({' '.join(verb.values)})'"] if verb.values else []
    parts += [f"'*:argument:{action}'"] if verb.arguments or of_below else []
    return " ".join(parts)


def _fish(verbs: Sequence[Verb]) -> str:
    lines = ["# fish completion of disttrain: disttrain completion fish | source", "complete -c disttrain -f"]
    for verb in verbs:
        first, _, second = verb.name.partition(" ")
        if not second:
            lines.append(f"complete -c disttrain -n __fish_use_subcommand -a {first} -d '{verb.about}'")
        seen = (
            f"-n '__fish_seen_subcommand_from {first}{f'; and __fish_seen_subcommand_from {second}' if second else ''}'"
        )
        lines += [f"complete -c disttrain {seen} -a '{' '.join(verb.values)}'"] if verb.values else []
        if verb.names(_RUNS):
            lines.append(f"complete -c disttrain {seen} -a '(path basename .disttrain/runs/*/ 2>/dev/null)'")
        if verb.names(_FILES) or verb.names(_RUNS):
            lines.append(f"complete -c disttrain {seen} -F")
        lines += [f"complete -c disttrain {seen} {_fish_option(option)}" for option in verb.options]
    return "\n".join([*lines, ""])


def _fish_option(option: Option) -> str:
    names = " ".join(f"-s {name[1:]}" if len(name) == 2 else f"-l {name[2:]}" for name in option.names)
    takes = "" if option.takes is None else " -r -F" if _is_path(option.takes) and not option.values else " -x"
    values = f" -a '{' '.join(option.values)}'" if option.values else ""
    return f"{names}{takes}{values} -d '{option.about}'"


_SCRIPTS: Final[Mapping[str, Callable[[Sequence[Verb]], str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}


def _is_path(shown: str) -> bool:
    return shown in _FOLDERS or "FILE" in shown
