"""Secrets leave no report and no archive: those that a name or a form tells."""

from __future__ import annotations

import pytest

from disttrain.cli.redaction import HIDDEN, is_secret, redacted, redacted_text


@pytest.mark.parametrize(
    "name", ["DB_PASSWORD", "hfToken", "--api-key", "AWS_SECRET_ACCESS_KEY", "passwd", "WANDB_API_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["tokenizer", "maxTokens", "secretName", "topologyKey", "key", "TOKEN_FILE", "passes", "author", ""]
)
def test_names_that_are_none(name: str) -> None:
    assert not is_secret(name)


def test_an_object_keeps_what_is_no_secret() -> None:
    pod = {
        "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x", "a": "b"}},
        "env": [{"name": "HF_TOKEN", "value": "abc"}, {"name": "LEVEL", "value": "3"}],
        "secretName": "data-key",
        "args": ["--password", "hunter2", "--depth", "3", "--token=abcdef"],
        "config": {"tokens": 5, "apiKey": "abc", "secret": {"name": "x"}, "password": ""},
    }
    assert redacted(pod) == {
        "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": HIDDEN, "a": "b"}},
        "env": [{"name": "HF_TOKEN", "value": HIDDEN}, {"name": "LEVEL", "value": "3"}],
        "secretName": "data-key",
        "args": ["--password", HIDDEN, "--depth", "3", f"--token={HIDDEN}"],
        "config": {"tokens": 5, "apiKey": HIDDEN, "secret": {"name": "x"}, "password": ""},
    }
    assert redacted({"kind": "Secret", "data": {"a": "YWJj"}, "stringData": {"b": "c"}}) == {
        "kind": "Secret",
        "data": {"a": HIDDEN},
        "stringData": {"b": HIDDEN},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://me:pass@host/x", f"s3://{HIDDEN}@host/x"),
        ("Authorization: Bearer abcdefghij", None),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", HIDDEN),
        ("using hf_abcdefghijklmnopqrstuv now", f"using {HIDDEN} now"),
        ("password=hunter2 depth=3", f"password={HIDDEN} depth=3"),
        ('{"token": "abcdef", "step": 3}', f'{{"token": "{HIDDEN}", "step": 3}}'),
        ("step 3 loss 0.5 token 7", "step 3 loss 0.5 token 7"),
        ("worker-1 http://127.0.0.1:42417/metrics", "worker-1 http://127.0.0.1:42417/metrics"),
    ],
)
def test_a_text(text: str, expected: str | None) -> None:
    found = redacted_text(text)
    assert found == expected if expected else "abcdefghij" not in found
