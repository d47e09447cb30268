"""What `Jobs` asks of the API server: nothing with a name that would lead the request elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from disttrain.client.errors import ClusterError
from disttrain.client.jobs import Jobs


class NoRequest:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is called")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/status", "a?x=y", "a#b", "a%2f", "-a", "A", "a\n", "a" * 254]
)
def test_a_name_that_no_object_can_have_reaches_no_api_server(name: str) -> None:
    jobs = Jobs(NoRequest(), "team")  # type: ignore[arg-type]
    for request in (
        jobs.delete(name),
        jobs.get(name),
        jobs.scale(name, 2),
        jobs.change(name, {"suspend": True}, what="suspend the job"),
    ):
        with pytest.raises(ClusterError, match="is no name of a job") as error:
            asyncio.run(request)
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value)
    with pytest.raises(ClusterError, match="is no name of a namespace"):
        Jobs(NoRequest(), name)  # type: ignore[arg-type]
