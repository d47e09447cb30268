"""What the tests on a real node share: one node for all of them, with both images."""

from collections.abc import Iterator

import pytest

from cluster import images as images_
from cluster.image_store import Store
from cluster.node import Node
from cluster.programs import require, skip


@pytest.fixture(scope="session")
def images() -> Store:
    """A store with the images of operator and trainer, as the source has them. `make programs` builds PyTorch's layer
    beforehand; here it is two thin layers, unless nobody did."""
    require("cluster")
    if line := images_.missing():
        skip(line)
    return images_.built()


@pytest.fixture(scope="session")
def node(images: Store) -> Iterator[Node]:
    with Node(images=images) as node:
        yield node
