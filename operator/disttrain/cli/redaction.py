"""Secrets taken out of what a user hands to others: of a report, and of the archive of `disttrain debug`. Pure.

A secret is known by its name (a variable API_KEY, an argument --password) or by its form (a private key, a token of a known service). One
that has neither stays: who hands a file on looks at it first.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

HIDDEN: Final = "[redacted]"

_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS: Final = frozenset(
    {"password", "passwd", "pwd", "passphrase", "secret", "token", "credential", "credentials", "apikey", "authorization", "cookie"}
)  # fmt: skip
_KEYS: Final = frozenset({"api", "access", "private", "secret", "account", "encryption", "signing", "ssh"})
"""What a secret key is called by, before the word key."""
_PLAIN_ENDS: Final = frozenset({"name", "file", "path", "dir", "id", "type", "count", "length", "ref"})
"""The last word of names that say where a secret is, not what it is."""
_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_FORMS: Final = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)"),
    re.compile(r"(?i)(?<=bearer )[\w.~+/-]{8,}=*"),
    re.compile(r"(?i)(?<=basic )[A-Za-z0-9+/]{12,}=*"),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"),
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|xox[abprs]-|dckr_pat_|npm_|pypi-)[\w-]{16,}"),
    re.compile(r"(?i)(?<=[?&]sig=)[^&\s'\"]+|(?<=X-Amz-Signature=)[^&\s'\"]+|(?<=X-Goog-Signature=)[^&\s'\"]+"),
)
_ASSIGNED: Final = re.compile(
    r"""(?P<name>[A-Za-z][\w-]{0,80})(?P<sign>["']?\s*[=:]\s*|["']\s*,\s*["'])(?P<quote>["']?)(?P<value>[^\s"',;&{}\[\]]{3,})"""
)
_NUMBER: Final = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")


def is_secret(name: str) -> bool:
    """Whether what has this name is a secret: DB_PASSWORD, hfToken, --api-key. Not tokenizer, maxTokens, secretName."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _PLAIN_ENDS:
        return False
    keys = any(second == "key" and first in _KEYS for first, second in pairwise(words))
    return keys or not _SECRET_WORDS.isdisjoint(words)


def redacted(value: Any, name: str = "") -> Any:
    """A copy of a value of JSON without its secrets. name: the field that holds it."""
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, list | tuple):
        return _list(value)
    if isinstance(value, str):
        return HIDDEN if value and is_secret(name) else redacted_text(value)
    return value


def redacted_text(text: str) -> str:
    """The same of lines of a log or file."""
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return _ASSIGNED.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    value = found["value"]
    if not is_secret(found["name"]) or _NUMBER.fullmatch(value) or value.startswith(HIDDEN[:-1]):
        return found[0]
    return f"{found['name']}{found['sign']}{found['quote']}{HIDDEN}"


def _object(body: Mapping[str, Any]) -> dict[str, Any]:
    if body.get("kind") == "Secret":
        hidden = {part: dict.fromkeys(body.get(part) or {}, HIDDEN) for part in ("data", "stringData") if part in body}
        return {name: hidden.get(name) or redacted(value, name) for name, value in body.items()}
    if isinstance(variable := body.get("name"), str) and isinstance(body.get("value"), str):  # of a list of variables
        return {name: redacted(value, variable if name == "value" else name) for name, value in body.items()}
    return {name: HIDDEN if name == _LAST_APPLIED else redacted(value, name) for name, value in body.items()}


def _list(values: Any) -> list[Any]:
    found = [redacted(value) for value in values]
    for number, option in enumerate(values[:-1]):
        if isinstance(option, str) and option.startswith("-") and "=" not in option and is_secret(option):
            found[number + 1] = HIDDEN if isinstance(values[number + 1], str) else found[number + 1]
    return found
