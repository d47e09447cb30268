"""What the tests on a real node share: one node for all of them, with both images."""

from collections.abc import Generator, Iterator

import pytest

from cluster import images as images_
from cluster.image_store import Store
from cluster.node import Node
from cluster.programs import require, skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed keeps the logs of the node that it used: the node's own block goes on, and would throw them away."""
    report = yield
    node = getattr(item, "funcargs", {}).get("node")
    if report.failed and isinstance(node, Node):
        report.sections.append(("the node", node.how_it_is()))
        report.sections.append(("the node's logs", str(node.keep_logs(f"{item.nodeid} failed"))))
    return report


@pytest.fixture(scope="session")
def images() -> Store:
    """A store with the images of operator and trainer, as the source has them. `make programs` builds PyTorch's layer
    beforehand; here it is two thin layers, unless that was not done."""
    require("cluster")
    if line := images_.missing():
        skip(line)
    return images_.built()


@pytest.fixture(scope="session")
def node(images: Store) -> Iterator[Node]:
    with Node(images=images) as node:
        yield node
