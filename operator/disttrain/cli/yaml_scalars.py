"""What kubectl takes a plain YAML scalar for: YAML 1.1 as sigs.k8s.io/yaml has it, which is neither PyYAML's reading nor that of YAML 1.2.

`yes` and `y` are true, `010` and `0o10` are 8, `1_000` is 1000, `1e-4` is a number; `1:30`, `2024-01-01` and `1e400` are strings.
Source: resolve.go of sigs.k8s.io/yaml/goyaml.v2. Not here: quotes, tags and collections (yaml_lines.py).
"""

import re
from typing import Final, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None

_TRUE: Final = ("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE: Final = ("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_NULL: Final = ("", "~", "null", "Null", "NULL")
_INFINITE: Final = (".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF")
_WORDS: Final[dict[str, Scalar]] = (
    dict.fromkeys(_TRUE, True)
    | dict.fromkeys(_FALSE, False)
    | dict.fromkeys(_NULL, None)
    | dict.fromkeys(_INFINITE, float("inf"))
    | dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf"))
    | dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))
)
_INTEGER: Final = re.compile(r"([-+]?)(0[bB][01]+|0[oO][0-7]+|0[xX][0-9a-fA-F]+|0[0-7]+|0|[1-9][0-9]*)")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_EXACT: Final = 2**53
"""Up to here a float that is a whole number is sent as one."""


def scalar(text: str) -> Scalar:
    """The value of a scalar that stands without quotes and without a tag. May be a float that is not finite."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] in "+-0123456789":
        digits = text.replace("_", "")
        whole = _integer(digits)
        return whole if whole is not None else _float(digits, text)
    return _float(text, text) if text[0] == "." else text


def key(value: Scalar) -> str | None:
    """The key that a scalar becomes in JSON, which knows strings only; None for one that kubectl refuses."""
    match value:
        case None:
            return None
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:.17g}" if float(f"{value:.15g}") != value else f"{value:.15g}"
        case _:
            return str(value)


def _integer(digits: str) -> int | None:
    found = _INTEGER.fullmatch(digits)
    if found is None:
        return None
    sign, number = found.groups()
    octal = len(number) > 1 and number[0] == "0" and number[1].isdigit()
    value = int(number, 8 if octal else 0) * (-1 if sign == "-" else 1)
    return value if -(2**63) <= value < (2**64 if not sign else 2**63) else None


def _float(digits: str, text: str) -> Scalar:
    if not _FLOAT.fullmatch(digits):
        return text
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        return text
    return int(value) if value.is_integer() and abs(value) < _EXACT else value
