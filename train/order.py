"""Which pictures each step of a run shows: a function of (seed, epoch, place), the same on any ranks.

An epoch is a row of slots, of which step after step takes the next batch. Slot k lies in lane k % lanes, and
belongs to rank k % world: where the ranks divide the lanes, a lane is one rank's for good, so a rank that
reads tars reads only those of its own lanes. Whatever the tars hold, every step has as many slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from vlm_vision.errors import ConfigError, DataError

SampleKey = tuple[int, int]  # (epoch, draw): draw % pictures is the picture, draw // pictures counts repeats
Places = NDArray[np.int64]

_LABELS = 1  # tells the shuffles of sources within a lane from those of pictures within a source


class Shuffle(Protocol):
    """Endless laps over the pictures of a source, each lap in another order.

    Attributes:
        pictures: of a lap.
    """

    pictures: int

    def __call__(self, lap: int, places: Places) -> Places:
        """The pictures that stand at these places of a lap; all places together name each picture once."""
        ...


class UniformShuffle:
    """Each order is as likely as any other."""

    def __init__(self, pictures: int, seed: int, source: int = 0) -> None:
        self.pictures, self._key = pictures, (seed, source)

    def __call__(self, lap: int, places: Places) -> Places:
        return _whole_order(self.pictures, self._key[0], lap, self._key[1])[places]


class ShardShuffle:
    """Shards in random order, and the samples of each in random order: neighbours come from one shard.

    Args:
        counts: samples of each shard; the pictures of the source are those of shard 0, then 1, and so on.
    """

    def __init__(self, counts: Sequence[int], seed: int, source: int = 0) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self.pictures = int(self._counts.sum())
        self._key = (seed, source)

    def __call__(self, lap: int, places: Places) -> Places:
        seed, source = self._key
        shards = _whole_order(len(self._counts), seed, lap, source)
        ends = np.cumsum(self._counts[shards])
        which = np.searchsorted(ends, places, side="right")
        found = np.empty_like(places)
        for turn in np.unique(which):
            shard, mine = int(shards[turn]), which == turn
            order = _shard_order(int(self._counts[shard]), seed, lap, source, shard + 1)
            found[mine] = self._starts[shard] + order[places[mine] - ends[turn] + self._counts[shard]]
        return found


class EpochOrder:
    """The draws of an epoch's slots, from one source or several mixed by their weights.

    A source of n pictures and weight w shows the next round(w n) places of its endless laps each epoch: none
    is drawn again before all have been.

    Args:
        shuffles: of the sources.
        weights: how often an epoch shows each picture of a source; None is once.
        lanes: that slots are dealt to; 1 where pictures may be read in any order.

    Attributes:
        size: slots of an epoch.
    """

    def __init__(
        self,
        shuffles: Sequence[Shuffle],
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        lanes: int = 1,
    ) -> None:
        self._shuffles, self._seed, self.lanes = shuffles, seed, lanes
        pairs = zip(weights or [1.0] * len(shuffles), shuffles, strict=True)
        self._sizes = [max(1, round(weight * shuffle.pictures)) for weight, shuffle in pairs]
        self._offsets = np.cumsum([0, *self._sizes])
        self._first = np.cumsum([0, *(shuffle.pictures for shuffle in shuffles)])
        self.size = sum(self._sizes)

    def draws(self, epoch: int, slots: Places) -> Places:
        """The picture of each slot, plus the number of all for each time that the epoch has shown it."""
        lanes, places = slots % self.lanes, slots // self.lanes
        found = np.empty_like(slots)
        sources, numbers = self._in_lanes(epoch, lanes, places)
        for source, shuffle in enumerate(self._shuffles):
            mine = sources == source
            first = epoch * self._sizes[source]
            at = first + self._lane_start(source, lanes[mine]) + numbers[mine]
            laps, at = at // shuffle.pictures, at % shuffle.pictures
            drawn = np.empty_like(at)
            for lap in np.unique(laps):
                now = laps == lap
                repeat = int(lap) - first // shuffle.pictures
                drawn[now] = shuffle(int(lap), at[now]) + self._first[source] + repeat * self._first[-1]
            found[mine] = drawn
        return found

    def _in_lanes(self, epoch: int, lanes: Places, places: Places) -> tuple[Places, Places]:
        """Of each place of a lane: whose picture stands there, and how many of that source stand before."""
        if len(self._shuffles) == 1:
            return np.zeros_like(places), places
        sources, numbers = np.empty_like(places), np.empty_like(places)
        for lane in np.unique(lanes):
            mine = lanes == lane
            counts = tuple(self._lane_size(source, int(lane)) for source in range(len(self._shuffles)))
            labels, before = _mixed(counts, self._seed, epoch, int(lane))
            sources[mine], numbers[mine] = labels[places[mine]], before[places[mine]]
        return sources, numbers

    # Pictures of all sources, one source after another, are dealt to the lanes in turn; so the lanes of a
    # source start at the one that follows the last picture of the source before. Each lane gets a stretch of
    # the source's pictures, which lie in few shards.

    def _lane_size(self, source: int, lane: int) -> int:
        even, rest = divmod(self._sizes[source], self.lanes)
        return int(even + ((lane - self._offsets[source]) % self.lanes < rest))

    def _lane_start(self, source: int, lanes: Places) -> Places:
        even, rest = divmod(self._sizes[source], self.lanes)
        own: Places = (lanes - self._offsets[source]) % self.lanes
        return own * even + np.minimum(own, rest)


class EpochBatches(Sampler[list[SampleKey]]):
    """This rank's keys of every global batch from a step on; order depends only on (seed, epoch).

    Pictures that do not fill an epoch's last batch sit that epoch out.
    """

    def __init__(
        self,
        order: EpochOrder | int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int,
        world: int,
    ) -> None:
        """Batches of global steps `start` to `stop`.

        Args:
            order: of the epochs; a number is that of pictures in one uniform source.

        Raises:
            DataError: fewer pictures than one batch, or a batch that does not divide among the ranks.
            ConfigError: lanes that do not divide among the ranks.
        """
        if isinstance(order, int):
            order = EpochOrder([UniformShuffle(order, seed)], seed)
        if order.size < batch_size:
            raise DataError(
                f"the data has {order.size} pictures, fewer than one batch of {batch_size}: lower batch_size"
            )
        if batch_size % world:
            raise DataError(f"batch_size {batch_size} does not divide among {world} ranks")
        if order.lanes > 1 and order.lanes % world:
            raise ConfigError(
                f"lanes {order.lanes} do not divide among {world} ranks: set data.lanes to a multiple "
                f"of {world}, and keep it for the whole run, since it changes the order"
            )
        self.order, self.batch_size = order, batch_size
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[SampleKey]]:
        per_epoch = self.order.size // self.batch_size
        share = np.arange(self.rank, self.batch_size, self.world)
        for step in range(self.start, self.stop):
            epoch, place = divmod(step, per_epoch)
            draws = self.order.draws(epoch, place * self.batch_size + share)
            yield [(epoch, draw) for draw in draws.tolist()]


@lru_cache(maxsize=8)  # this lap and the next of a few sources
def _whole_order(count: int, *key: int) -> Places:
    return np.random.default_rng(key).permutation(count)


@lru_cache(maxsize=512)  # one of each lane; a thousand samples take 8 kB
def _shard_order(count: int, *key: int) -> Places:
    return np.random.default_rng(key).permutation(count)


@lru_cache(maxsize=512)
def _mixed(counts: tuple[int, ...], seed: int, epoch: int, lane: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sources in random order, each as often as it counts; and how many of its own stand before each."""
    labels = np.repeat(np.arange(len(counts), dtype=np.uint8), counts)
    labels = np.random.default_rng((seed, epoch, lane, _LABELS)).permutation(labels)
    before = np.empty(len(labels), dtype=np.int64)
    for source, count in enumerate(counts):
        before[labels == source] = np.arange(count)
    return labels, before
