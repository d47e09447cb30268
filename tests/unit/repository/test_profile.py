"""Properties are no tests of speed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.none())
def test_an_example_may_take_its_time(nothing: None) -> None:
    assert settings.default is not None
    assert settings.default.deadline is None
