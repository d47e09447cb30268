from collections.abc import Iterator

import pytest

from monitoring.recording import Recording, play
from monitoring.server import Prometheus, replay


@pytest.fixture(scope="session")
def recording() -> Recording:
    return play()


@pytest.fixture(scope="session")
def replayed(recording: Recording, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A real Prometheus that holds the recording."""
    with replay(tmp_path_factory.mktemp("replay"), recording.openmetrics()) as server:
        yield server
