"""The master's report under network.tls Mutual: signed by the key of the attempt, for this question, and believed only so."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from disttrain import certificates
from disttrain.api.job import Metadata
from disttrain.api.names import CA, CERTIFICATE
from disttrain.api.runtime import Progress
from disttrain.controller.cache import Key
from disttrain.controller.progress import Master, Outcome, ProgressReader
from disttrain_trainer.errors import WrongInput
from disttrain_trainer.net.report_signer import ReportSigner
from transports import certificate, mutual_config

REPORT = Progress(attempt=1, step=41).model_dump_json(by_alias=True)
NONCE = "0123456789abcdef"


def signer(folder: Path) -> ReportSigner:
    """That of the master of an attempt with a certificate of its own."""
    found = ReportSigner.of(mutual_config(), certificate(folder))
    assert found is not None
    return found


def public_key(folder: Path) -> str:
    return certificates.public_key((folder / CERTIFICATE).read_bytes())


def answer(signer: ReportSigner, nonce: str = NONCE, report: str = REPORT) -> bytes:
    said = signer.signed(nonce, report)
    assert said is not None
    return said.encode()


def test_report_that_the_attempts_key_signed_for_this_question_is_read(tmp_path: Path) -> None:
    said = answer(signer(tmp_path))
    assert certificates.read_progress(said, nonce=NONCE, public_key=public_key(tmp_path)).step == 41


def test_report_of_another_attempt_or_job_or_question_or_that_was_changed_is_none(tmp_path: Path) -> None:
    ours, theirs = signer(tmp_path / "ours"), signer(tmp_path / "theirs")
    changed = json.loads(answer(ours))
    changed["report"] = changed["report"].replace("41", "42")
    for wrong in (
        answer(theirs),
        answer(ours, nonce=NONCE[::-1]),
        json.dumps(changed).encode(),
        json.dumps(changed | {"signature": "!"}).encode(),
        json.dumps(changed | {"signature": ""}).encode(),
        REPORT.encode(),
        b"",
    ):
        with pytest.raises(ValueError):
            certificates.read_progress(wrong, nonce=NONCE, public_key=public_key(tmp_path / "ours"))


@pytest.mark.parametrize("nonce", ["0123", "x" * 16, "0" * 65, "../metrics", "0123456789ABCDEF", "0123456789abcdef\n"])
def test_master_signs_for_nothing_but_a_nonce(tmp_path: Path, nonce: str) -> None:
    assert signer(tmp_path).signed(nonce, REPORT) is None


def test_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (certificate(tmp_path) / "tls.key").write_text("no key")
    with pytest.raises(WrongInput, match=r"tls\.key: the key of the attempt cannot be read"):
        ReportSigner.of(mutual_config(), tmp_path)


def test_certificate_signs_with_its_own_key_alone(tmp_path: Path) -> None:
    files = certificates.of_attempt(Metadata(name="a", uid="u"), 1, now=datetime.now(UTC))
    assert certificates.public_key(files[CERTIFICATE]) != certificates.public_key(files[CA])


def master(public_key: str | None) -> Master:
    return Master(namespace="mine", pod="m", uid="u", ip="10.0.0.9", port=9400, interval=5, public_key=public_key)


async def outcome(fetch: Callable[[Master], Awaitable[bytes]], public_key: str | None) -> tuple[Outcome, list[int]]:
    steps: list[int] = []
    reader = ProgressReader(fetch, lambda _, __, progress: steps.append(progress.step))
    return await reader.read(Key("mine", "digits"), master(public_key)), steps


async def test_operator_asks_with_a_new_nonce_each_time_and_sends_nothing_else(tmp_path: Path) -> None:
    ours, asked = signer(tmp_path), list[str]()

    async def fetch(master: Master) -> bytes:
        asked.append(master.path)
        return answer(ours, nonce=master.path.removeprefix("progress/"))

    for _ in range(2):
        assert await outcome(fetch, public_key(tmp_path)) == (Outcome.REPORTED, [41])
    assert len(set(asked)) == 2


async def test_operator_takes_no_report_of_a_pod_that_has_not_the_key(tmp_path: Path) -> None:
    ours = signer(tmp_path / "ours")
    first: list[bytes] = []

    async def forged(_: Master) -> bytes:
        return REPORT.encode()

    async def repeated(master: Master) -> bytes:
        first.append(answer(ours, nonce=master.path.removeprefix("progress/")))
        return first[0]

    key = public_key(tmp_path / "ours")
    assert await outcome(forged, key) == (Outcome.SILENT, [])
    assert (await outcome(repeated, key))[0] is Outcome.REPORTED
    assert await outcome(repeated, key) == (Outcome.SILENT, [])


async def test_without_tls_a_report_is_read_as_it_is() -> None:
    async def fetch(master: Master) -> bytes:
        assert master.path == "progress"
        return REPORT.encode()

    assert await outcome(fetch, None) == (Outcome.REPORTED, [41])
