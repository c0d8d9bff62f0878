"""The batches of a run: the same on any ranks and workers, from any step on, and what they carry."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_shards import samples, tar_of
from tiny import captioned_pictures, tiny_dual_encoder

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.fingerprints import caption_id, join_looks, picture_id
from vlm_vision.train.pairs import Batch, Pairs, training_loader
from vlm_vision.train.pairs_config import AugmentConfig, PairsConfig

STEPS = 12
AUGMENT = AugmentConfig(crop_area=(0.3, 1.0), brightness=0.5, flip=0.5)


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_dual_encoder()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """A table shown twice an epoch, tars of uneven sizes once, and tars with a bad sample by halves."""
    folder = tmp_path_factory.mktemp("data")
    table = captioned_pictures(folder / "table", 9)
    for name, counts in (("once", (5, 1, 7, 2)), ("half", (3, 6))):
        (folder / name).mkdir()
        for number, count in enumerate(counts):
            members = samples(10 * number, count)
            if name == "half" and number == 1:
                members["0012.png"] = b"torn"
            (folder / name / f"{number}.tar").write_bytes(tar_of(members))
    return Pairs(
        (
            PairsConfig(path=str(table), weight=2, templates=("{}", "a picture: {}")),
            PairsConfig(path=str(folder / "once"), lanes=4),
            PairsConfig(path=str(folder / "half"), lanes=4, weight=0.5, max_bad_share=0.2),
        )
    )


def run(pairs: Pairs, model: DualEncoder, **options: Any) -> list[Batch | DataError]:
    options = {"seed": 3, "batch_size": 8, "start": 0, "stop": STEPS, **options}
    return list(training_loader(pairs, model.image_processor, model.tokenizer, AUGMENT, **options))


def bits(batches: list[Batch | DataError], step: int) -> list[tuple[Any, ...]]:
    """Every sample of a step, as far as the model sees it."""
    batch = batches[step]
    assert isinstance(batch, Batch)
    tokens = batch.tokens[batch.captions]
    return [
        (name, square.numpy().tobytes(), ids.tolist(), int(picture), int(caption))
        for name, square, ids, picture, caption in zip(
            batch.names, batch.squares, tokens, batch.picture_ids, batch.caption_ids, strict=True
        )
    ]


@pytest.fixture(scope="module")
def whole(pairs: Pairs, model: DualEncoder) -> list[Batch | DataError]:
    return run(pairs, model)


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 1)])
@pytest.mark.parametrize("start", [0, 5])
def test_any_step_resumes_bit_exact_on_other_ranks_and_workers(
    start: int, world: int, workers: int, pairs: Pairs, model: DualEncoder, whole: list[Batch | DataError]
) -> None:
    shares = [
        run(pairs, model, start=start, rank=rank, world=world, workers=workers) for rank in range(world)
    ]
    assert {len(share) for share in shares} == {STEPS - start}
    for step in range(start, STEPS):
        parts = [bits(share, step - start) for share in shares]
        assert {len(part) for part in parts} == {8 // world}
        joined = [part[place] for place in range(8 // world) for part in parts]
        assert joined == bits(whole, step)


def test_a_seed_is_an_order(pairs: Pairs, model: DualEncoder, whole: list[Batch | DataError]) -> None:
    assert bits(run(pairs, model, seed=4, stop=1), 0) != bits(whole, 0)


def test_batches_follow_the_epochs(pairs: Pairs, whole: list[Batch | DataError]) -> None:
    assert (len(pairs), pairs.epoch_size) == (9 + 15 + 9, 18 + 15 + 4)
    per_epoch = 37 // 8
    for epoch in range(STEPS // per_epoch):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        shown = [sample for step in steps for sample in bits(whole, step)]
        names = [name for name, *_ in shown]
        assert max(names.count(name) for name in names if "/once/" in name) == 1
        assert max(names.count(name) for name in names if ".csv" in name) == 2
        assert (
            len({(name, square) for name, square, *_ in shown if ".csv" in name}) > 9
        )  # twice, but otherwise


def test_a_bad_sample_is_replaced_by_its_neighbour_and_told(
    pairs: Pairs, whole: list[Batch | DataError]
) -> None:
    batches = [batch for batch in whole if isinstance(batch, Batch)]
    told = {error for batch in batches for error in batch.bad}
    assert len(told) == 1
    assert "1.tar, sample '0012': is not a picture" in told.pop()
    shown = next(batch for batch in batches if batch.bad)
    assert any("sample '0013'" in name for name in shown.names)


def test_ids_tell_what_is_the_same(whole: list[Batch | DataError]) -> None:
    pictures: dict[str, set[int]] = {}
    for batch in whole:
        assert isinstance(batch, Batch)
        assert batch.picture_ids.dtype == batch.caption_ids.dtype == torch.int64
        for name, picture in zip(batch.names, batch.picture_ids.tolist(), strict=True):
            pictures.setdefault(name, set()).add(picture)
        for one in range(8):
            same = batch.caption_ids == batch.caption_ids[one]
            assert torch.equal(same, batch.captions == batch.captions[one])
    assert all(len(ids) == 1 for ids in pictures.values())  # before augmentation
    assert len(set.union(*pictures.values())) > 20


def test_caption_ids_overlook_case_punctuation_and_space() -> None:
    same = ["A dog, running.", "a dog running", " a  dog\n(running)!", "A DOG – running"]
    assert len({caption_id(text) for text in same}) == 1
    others = ["a dog", "a dogrunning", "running a dog", "", "!", "?", "ein Hund läuft", "ein Hund lauft"]
    assert len({caption_id(text) for text in others} | {caption_id(same[0])}) == len(others) + 1
    known = blake2b(b"a dog", digest_size=8).digest()  # in every run and on every machine
    assert caption_id("A dog!") == int.from_bytes(known, "big", signed=True)
    assert caption_id("Straße") == caption_id("STRASSE")


def test_picture_ids_see_through_copies() -> None:
    scene = Image.radial_gradient("L").resize((120, 90)).convert("RGB")
    scene.paste((220, 40, 30), (10, 20, 50, 60))
    scene.paste((20, 60, 230), (70, 10, 110, 40))
    scene.paste((240, 240, 60), (60, 60, 100, 85))
    copies = [
        scene.resize((60, 45), Image.Resampling.BICUBIC),
        scene.resize((240, 180)),
        scene.convert("P").convert("RGB"),
    ]
    assert {picture_id(copy) for copy in copies} == {picture_id(scene)}
    others = [
        scene.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        scene.rotate(180),
        scene.convert("L").convert("RGB"),
    ]
    plain = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "#ff0001", "white")]
    assert len({picture_id(image) for image in (scene, *others, *plain)}) == 8


def test_looks_that_differ_in_a_bit_are_joined() -> None:
    base = [0x0123456789ABCDEF, -1, 0, -(2**63)]
    ids = [base[0], base[0] ^ 1, base[0] ^ 3, base[0] ^ 0x70, base[1], base[1] ^ (1 << 40), base[2], base[3]]
    found = join_looks(np.array([*ids, base[0]], dtype=np.int64))
    names = [found.tolist().index(value) for value in found.tolist()]
    assert names == [0, 0, 0, 3, 4, 4, 6, 6, 0]  # 0 and the sign bit alone differ in one
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63, 5000)
    assert np.array_equal(join_looks(numbers), numbers)


def test_lanes_and_batches_that_do_not_divide(pairs: Pairs, model: DualEncoder) -> None:
    with pytest.raises(ConfigError, match="lanes 4 do not divide among 8 ranks"):
        run(pairs, model, world=8)
    with pytest.raises(DataError, match="batch_size 8 does not divide among 3 ranks"):
        run(pairs, model, world=3)
    with pytest.raises(DataError, match="37 pictures, fewer than one batch of 64"):
        run(pairs, model, batch_size=64)
    mixed = (pairs.sources[1].config, pairs.sources[2].config.model_copy(update={"lanes": 8}))
    with pytest.raises(ConfigError, match=r"lanes \[4, 8\]; give all the same"):
        Pairs(mixed).order(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_in_place_of_the_batch(workers: int, pairs: Pairs, model: DualEncoder) -> None:
    strict = Pairs(pairs.sources[2].config.model_copy(update={"max_bad_share": 0.0, "weight": 1.0}))
    (found,) = run(strict, model, stop=1, workers=workers)
    assert isinstance(found, DataError)
    assert "1.tar, sample '0012': is not a picture" in str(found)


def test_a_torn_tar_does_not_wait_for_the_others(tmp_path: Path, model: DualEncoder) -> None:
    """Its whole samples stand in for those that are missing, up to the bound."""
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(samples(10 * number, 8)))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 8, "1.tar": 8}))
    torn = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(torn[: len(torn) // 2])
    config = PairsConfig(path=str(tmp_path), lanes=2, max_bad_share=0.5)
    batches = run(Pairs(config), model, stop=4)
    assert all(isinstance(batch, Batch) for batch in batches)
    (error,) = run(Pairs(config.model_copy(update={"max_bad_share": 0.0})), model, stop=1)
    assert isinstance(error, DataError)
    assert "cut off" in str(error)


def test_the_runs_own_randomness_is_left_alone(pairs: Pairs, model: DualEncoder) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(pairs, model, stop=1, workers=1)
    assert torch.equal(torch.get_rng_state(), before)
