"""Which pictures each step shows: by weight, the same on any number of ranks, each tar on few of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.order import EpochBatches, EpochOrder, ShardShuffle, UniformShuffle

SIZE, BATCH = 23, 4
COUNTS = [7, 0, 30, 1, 12, 12, 19, 3]  # samples of eight tars, 84 in all


def batches(
    start: int, stop: int, rank: int = 0, world: int = 1, seed: int = 0
) -> list[list[tuple[int, int]]]:
    return list(EpochBatches(SIZE, BATCH, seed, start, stop, rank, world))


def mixed(lanes: int = 8) -> EpochOrder:
    """Tars once, a table twice, another table by halves."""
    sources = [ShardShuffle(COUNTS, 5), UniformShuffle(30, 5, 1), UniformShuffle(25, 5, 2)]
    return EpochOrder(sources, 5, weights=(1, 2, 0.5), lanes=lanes)


def epoch_of(order: EpochOrder, epoch: int) -> list[int]:
    return order.draws(epoch, np.arange(order.size)).tolist()


def test_an_epoch_shows_no_picture_twice() -> None:
    per_epoch = SIZE // BATCH
    for epoch in range(3):
        keys = [key for batch in batches(epoch * per_epoch, (epoch + 1) * per_epoch) for key in batch]
        assert {key[0] for key in keys} == {epoch}
        assert len({key[1] for key in keys}) == per_epoch * BATCH
    assert len(EpochBatches(SIZE, BATCH, 0, 3, 17, 0, 1)) == 14
    left_out = [set(range(SIZE)) - {i for b in batches(5 * e, 5 * e + 5) for _, i in b} for e in range(3)]
    assert left_out[0] != left_out[1]  # each epoch leaves others out


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_same_global_batches(world: int) -> None:
    shares = [batches(0, 12, rank, world) for rank in range(world)]
    joined = [
        [share[step][place] for place in range(BATCH // world) for share in shares] for step in range(12)
    ]
    assert joined == batches(0, 12)


@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, 11])
def test_starting_in_the_middle_gives_the_rest(start: int) -> None:
    assert batches(start, 12) == batches(0, 12)[start:]


def test_seeds_and_epochs_order_differently() -> None:
    assert batches(0, 5) != batches(0, 5, seed=1)
    assert [i for b in batches(0, 5) for _, i in b] != [i for b in batches(5, 10) for _, i in b]


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="3 pictures, fewer than one batch of 4: lower batch_size"):
        EpochBatches(3, 4, 0, 0, 1, 0, 1)
    with pytest.raises(DataError, match="batch_size 4 does not divide among 3 ranks"):
        EpochBatches(9, 4, 0, 0, 1, 0, 3)
    with pytest.raises(
        ConfigError, match=r"lanes 8 do not divide among 3 ranks: set data\.lanes to a multiple"
    ):
        EpochBatches(mixed(), 12, 0, 0, 1, 0, 3)
    assert len(batches(0, 2)) == 2


@pytest.mark.parametrize("lanes", [1, 8, 64, 200])  # the last are more than there are pictures
def test_an_epoch_shows_each_picture_by_its_weight(lanes: int) -> None:
    order, pictures, tars = mixed(lanes), 84 + 30 + 25, 84
    assert order.size == 84 + 60 + 12
    halves: Counter[int] = Counter()
    for epoch in range(4):
        draws = epoch_of(order, epoch)
        assert len(set(draws)) == order.size  # so that no augmentation is drawn twice
        seen = Counter(draw % pictures for draw in draws)
        assert all(seen[picture] == 1 for picture in range(tars))
        assert all(seen[picture] == 2 for picture in range(tars, tars + 30))
        halves.update({picture: seen[picture] for picture in range(tars + 30, pictures)})
        if epoch == 1:  # 24 of 25
            assert max(halves.values()) == 1
            assert sum(halves.values()) == 24
    assert epoch_of(order, 0) != epoch_of(order, 1)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_uneven_tars_give_every_rank_the_same_number_of_samples(world: int) -> None:
    alone = [sorted(keys) for keys in EpochBatches(mixed(), 16, 0, 0, 30, 0, 1)]
    shares = [list(EpochBatches(mixed(), 16, 0, 0, 30, rank, world)) for rank in range(world)]
    assert {len(keys) for share in shares for keys in share} == {16 // world}
    assert [sorted(key for share in shares for key in share[step]) for step in range(30)] == alone


def test_a_rank_reads_only_the_tars_of_its_lanes() -> None:
    """64 tars on 8 lanes: each lane has eight of them, of which two ends may be shared with a neighbour."""
    counts = [50 + number % 7 for number in range(64)]
    order, ends = EpochOrder([ShardShuffle(counts, 0)], 0, lanes=8), np.cumsum(counts)
    for world in (2, 4, 8):
        read = []
        for rank in range(world):
            steps = order.size // 32
            draws = [draw for keys in EpochBatches(order, 32, 0, 0, steps, rank, world) for _, draw in keys]
            read.append(set(np.searchsorted(ends, draws, side="right").tolist()))
        assert max(map(len, read)) <= 64 // world + 8 // world + 1
        assert sum(map(len, read)) <= 64 + 8


def test_a_lane_goes_through_its_tars_one_after_another() -> None:
    counts = [40] * 6
    order = EpochOrder([ShardShuffle(counts, 1)], 1, lanes=2)
    lane = order.draws(0, np.arange(0, order.size, 2)) // 40
    assert (np.diff(lane) != 0).sum() == 2  # three tars
    inside = order.draws(0, np.arange(0, 80, 2)) % 40
    assert sorted(inside.tolist()) == list(range(40))
    assert inside.tolist() != list(range(40))


def test_sources_are_mixed_evenly_over_an_epoch() -> None:
    order = EpochOrder([ShardShuffle([300] * 4, 0), UniformShuffle(400, 0, 1)], 0, lanes=8)
    is_table = order.draws(0, np.arange(order.size)) >= 1200
    shares = is_table.reshape(16, 100).mean(axis=1)  # 0.25 on average; six standard deviations are 0.26
    assert shares.min() > 0
    assert shares.max() < 0.51
