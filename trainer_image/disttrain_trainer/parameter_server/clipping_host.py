"""A shard that clips by the norm of the whole gradient, of which it has a part (docs/design/0021): ShardHost with a step in two phases."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from disttrain_trainer.model import clipping, square_tree
from disttrain_trainer.parameter_server.shard import Shard
from disttrain_trainer.parameter_server.shard_host import ShardHost
from disttrain_trainer.parameter_server.squares import Squares

NormPart = dict[str, Any]
"""An element of `norms` in the messages to the master (net/messages.py)."""


class _WholeSum(NamedTuple):
    """The sum of a step that waits for the norm of the whole gradient."""

    first: int
    """The part under which the shard holds it."""
    divisor: float
    squares: Squares
    """Of the values; the scale is that of the mean."""


class ClippingHost(ShardHost):
    """See ShardHost: any thread may call these methods, too. Without a clip nothing here is used."""

    def __init__(self, *, on_sum: Callable[[], None] = lambda: None, **options: Any) -> None:
        """on_sum: called with the lock held when there is a new answer of `norm_part`. options: of ShardHost."""
        super().__init__(**options)
        self._on_sum = on_sum
        self._whole: _WholeSum | None = None
        self._last_norm: tuple[int, float] | None = None
        """The version that the last step has made, and the norm of its gradient before the clip."""

    def _sum_is_whole(self, shard: Shard, first: int) -> None:
        """The sum of a step is whole: its norm is that over all shards."""
        divisor, squares = self._divisor(), shard.squares(first)
        self._whole = _WholeSum(first, divisor, replace(squares, scale=squares.scale / divisor))
        if self._place[1] > 1:
            self._on_sum()
            return
        norm = math.sqrt(math.fsum(map(square_tree.total, squares.nodes))) * abs(self._whole.squares.scale)
        self._step_with(self._whole, norm)
        self._norms.add(shard.version, norm**2)

    def _step_with(self, whole: _WholeSum, norm: float) -> None:
        assert self._clip is not None
        self._whole = None
        self._policy.proceed()
        self._last_norm = self._policy.version, norm
        factor = clipping.coefficient(norm, self._clip)
        shard = self._known_shard()
        first, divisor = whole.first, whole.divisor
        rate = self._rate.factor(first, 0)
        self._absorb(shard, (), index=first, update=first, rate=rate, factor=factor, divisor=divisor, norm=norm)

    def norm_part(self) -> NormPart | None:
        """What the master needs to know of the sum of a step that waits for its norm, or else of the last step. None: nothing."""
        with self._changed:
            place = {"shard": self._place[0], "term": self.term}
            if self.over or self._place[1] == 1:
                return None
            if (whole := self._whole) is not None:
                squares = {"scale": whole.squares.scale, "nodes": whole.squares.nodes}
                return place | {"version": self._policy.version + 1} | squares
            if self._last_norm is None:
                return None
            version, norm = self._last_norm
            return place | {"version": version, "norm": norm}

    def take_norm(self, version: int, norm: float) -> None:
        """The norm of the gradient of the step that makes this version: the step is made, if it waits for that."""
        with self._changed:
            whole = self._whole
            if self.over or whole is None or version != self._policy.version + 1:
                return
            try:
                self._step_with(whole, norm)
            except BaseException:
                self.over = True
                raise
            self._forget_buffers()
            self._changed.notify_all()
