"""What ranks of a group send and get of the servers' vectors: together all of it, each element once, whatever the cut of the servers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain_trainer.model.flat import Span
from disttrain_trainer.net.frames import ProtocolError, Refusal
from disttrain_trainer.parameter_server.assembly import Assemblies, Pushed
from disttrain_trainer.parameter_server.sessions import Gradient, Session
from disttrain_trainer.parameter_server.shard import Buffers
from disttrain_trainer.parameter_server.shares import PackedShare, RankShare, Strip, packed_spans


def span(start: int, stop: int) -> Span:
    return Span(dtype=torch.float64, start=start, stop=stop)


def elements(strip: Strip) -> list[int]:
    return [index for _, start, stop in strip.runs() for index in range(start, stop)]


@given(
    start=st.integers(0, 5),
    length=st.integers(1, 4),
    count=st.integers(1, 6),
    gap=st.integers(0, 4),
    first=st.integers(0, 40),
    size=st.integers(0, 40),
)
def test_a_strip_within_a_shard_has_the_elements_of_both(
    start: int, length: int, count: int, gap: int, first: int, size: int
) -> None:
    strip = Strip(0, start, length, count, length + gap if count > 1 else 0)
    found = [first + index for piece in strip.within(first, first + size) for index in elements(piece)]
    assert found == [index for index in elements(strip) if first <= index < first + size]


def test_ranks_pack_a_model_that_is_cut_by_rows_and_by_columns_and_put_it_together_again() -> None:
    # A row-cut 4 x 6, a column-cut 4 x 6, and a vector of 5 that the first rank owns; over three shards.
    ranks = [
        (Strip(0, 0, 12), Strip(0, 24, 3, 4, 6), Strip(0, 48, 5)),
        (Strip(0, 12, 12), Strip(0, 27, 3, 4, 6)),
    ]
    whole = torch.arange(53, dtype=torch.float64)
    shards = [(span(0, 16),), (span(16, 40),), (span(40, 53),)]
    again = [torch.zeros(one.length, dtype=torch.float64) for (one,) in shards]
    for strips in ranks:
        rank = RankShare("lease", 2, strips)
        own = [rank.of_shard(spans) for spans in shards]
        packed = torch.cat([strip.of(whole).reshape(-1) for strip in strips])
        for share, spans, (at,), into in zip(own, shards, packed_spans(own, shards[0]), again, strict=True):
            lengths = [one.length for one in spans]
            assert RankShare.decode(share.encode(), lengths, members=2) == share
            on_server = PackedShare(share, spans)
            on_server.gather([whole[spans[0].start : spans[0].stop]])
            data = torch.frombuffer(on_server.views[0], dtype=torch.float64)
            assert torch.equal(data, packed[at.start : at.stop])
            on_server.scatter([into])
    assert torch.equal(torch.cat(again), whole)


@pytest.mark.parametrize(
    "strips",
    [
        (Strip(0, 0, 9),),
        (Strip(1, 0, 1),),
        (Strip(0, 1, 2, 3, 3),),
        (Strip(0, 0, 2, 2, 1),),
        (Strip(0, 0, 4), Strip(0, 3, 1)),
        (Strip(0, 0, 0),),
    ],
    ids=["too long", "no vector", "runs beyond the end", "runs that overlap", "strips that overlap", "empty"],
)
def test_a_share_of_what_is_not_there_is_refused(strips: tuple[Strip, ...]) -> None:
    with pytest.raises(ProtocolError):
        RankShare.decode(RankShare("lease", 2, strips).encode(), [8], members=2)


def test_a_share_of_a_group_of_another_size_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a group of 3 ranks; those of this job have 2"):
        RankShare.decode(RankShare("lease", 3, ()).encode(), [8], members=2)


class Kept:
    """A shard of 4 elements that keeps what it gets."""

    def __init__(self) -> None:
        self.pushed: list[tuple[Gradient, list[float]]] = []
        self.first: list[float] = []
        self.free = 0

    def take(self) -> Buffers:
        self.free -= 1
        return Buffers((span(0, 4),))

    def give(self, buffers: Buffers) -> None:
        self.free += 1

    def initialize(self, values: Buffers) -> bool:
        self.first = values.parts[0][:4].tolist()
        return True

    def push(self, session: Session, gradient: Gradient, buffers: Buffers | None) -> Pushed:
        self.pushed.append((gradient, buffers.parts[0][:4].tolist() if buffers is not None else []))
        return Pushed(1, late=False)

    def brought(self, session: Session, clock: int) -> int:
        return 0


def share_of(rank: int, lease: str = "a", value: float = 0.0, length: int = 2) -> PackedShare:
    found = PackedShare(RankShare(lease, 2, (Strip(0, 2 * rank, length),)), (span(0, 4),))
    torch.frombuffer(found.views[0], dtype=torch.float64).fill_(value)
    return found


def part(index: int, *, samples: int = 2, version: int = 0) -> Gradient:
    return Gradient(index=index, samples=samples, batch_samples=4, clock=0, version=version)


def test_a_part_counts_once_both_ranks_have_brought_their_shares() -> None:
    shard = Kept()
    found = Assemblies(shard)
    found.push(Session(0, "x"), part(3, version=7), share_of(0, value=1.0))
    assert shard.pushed == []
    found.push(Session(1, "y"), part(3, version=5), share_of(1, value=2.0))
    [(gradient, values)] = shard.pushed
    assert values == [1.0, 1.0, 2.0, 2.0]
    assert gradient.took is None
    assert gradient.version == 5, "the oldest parameters that a share is of"


def test_shares_of_two_leases_make_no_part_and_what_a_lost_rank_brought_is_dropped() -> None:
    shard = Kept()
    found = Assemblies(shard)
    found.push(Session(0, "x"), part(3), share_of(0, value=1.0))
    found.push(Session(3, "y"), part(3), share_of(1, "b", value=2.0))
    assert shard.pushed == []
    assert shard.free == -2
    found.abandon("a")
    assert shard.free == -1
    found.push(Session(2, "z"), part(3), share_of(0, "b", value=3.0))
    assert [values for _, values in shard.pushed] == [[3.0, 3.0, 2.0, 2.0]]


def test_a_part_without_samples_counts_once_for_the_group() -> None:
    shard = Kept()
    found = Assemblies(shard)
    for rank in range(2):
        found.push(Session(rank, "x"), part(3, samples=0), share_of(rank))
    assert [(gradient.samples, values) for gradient, values in shard.pushed] == [(0, [])]


def test_elements_of_a_rank_that_names_none_took_part_beside_those_that_another_rank_names() -> None:
    shard = Kept()
    found = Assemblies(shard)
    some = Gradient(index=3, samples=2, batch_samples=4, clock=0, version=0, took=(((0, 1),),))
    found.push(Session(0, "x"), some, share_of(0))
    found.push(Session(1, "y"), part(3), share_of(1))
    assert shard.pushed[0][0].took == (((0, 1), (2, 4)),)


def test_the_first_parameters_are_there_when_all_ranks_have_offered_theirs() -> None:
    shard = Kept()
    found = Assemblies(shard)
    assert not found.initialize(Session(0, "x"), share_of(0, value=1.0))
    assert shard.first == []
    assert found.initialize(Session(1, "y"), share_of(1, value=2.0))
    assert shard.first == [1.0, 1.0, 2.0, 2.0]


def test_shares_that_leave_elements_out_are_refused() -> None:
    shard = Kept()
    found = Assemblies(shard)
    found.push(Session(0, "x"), part(3), share_of(0))
    with pytest.raises(Refusal, match=r"the shares of 2 ranks have \[3\] elements, not \[4\]"):
        found.push(Session(1, "y"), part(3), share_of(1, length=1))
    assert shard.free == 0
