"""What an answer of the API server means to a user: one line, and an exit code for each kind."""

from __future__ import annotations

import pytest

from disttrain.client import errors
from disttrain.kube.api import ApiError, Conflict, NotFound, Refused, Unavailable

NO_JOB = NotFound(404, "NotFound", 'disttrainjobs.disttrain.dev "digits" not found')
NO_KIND = NotFound(404, "", "404 page not found")
FORBIDDEN = Refused(403, "Forbidden", 'User "jane" cannot list resource "disttrainjobs"')

CASES = [
    (NO_JOB, 2, "namespace team has no DistTrainJob digits: `disttrain ls -A`"),
    (NO_KIND, 5, "the cluster has no disttrainjobs.disttrain.dev: install"),
    (FORBIDDEN, 4, 'you may not read the job in namespace team: User "jane" cannot'),
    (Unavailable(401, "Unauthorized", "Unauthorized"), 3, "your login has expired"),
    (Unavailable(0, "ClientConnectorError", "no answer to GET /apis"), 3, "no answer to GET /apis"),
    (Refused(422, "Invalid", "spec.worker.replicas: must lie within"), 2, "spec.worker.replicas: must lie within"),
    (Conflict(409, "Conflict", "it changed"), 2, "it changed"),
    (
        NotFound(404, "", "<!DOCTYPE html>\n<html>\n"),
        3,
        "HTTP 404 from a program that is no API server, such as a proxy",
    ),
    (Refused(418, "Denied", "line 1\nline 2\r\n\x1b[31mred"), 2, "line 1 line 2 [31mred"),
]


@pytest.mark.parametrize(("answer", "code", "words"), CASES, ids=[str(answer.status) for answer, *_ in CASES])
def test_each_kind_of_answer_is_one_line_with_an_exit_code(answer: ApiError, code: int, words: str) -> None:
    found = errors.of_answer(answer, what="read the job", namespace="team", job="digits")
    assert found.exit_code == code
    assert words in str(found)
    assert str(found).isprintable()


def test_all_namespaces_are_named_so() -> None:
    assert "in all namespaces" in str(errors.of_answer(FORBIDDEN, what="list the jobs", namespace=None))
