"""Zero-shot accuracy and retrieval against the same scores spelled out pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import COLOURS, captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision.config import load_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.preprocess import open_image
from vlm_vision.train.validation import check_validation, evaluate, validate_dual_encoder
from vlm_vision.train.validation_config import ValidationConfig, ZeroShotConfig

PICTURES = 11
TEMPLATES = ("a photo of {}.", "{}", "one {} here")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_dual_encoder().eval()


@pytest.fixture
def data(tmp_path: Path) -> ZeroShotConfig:
    return ZeroShotConfig(path=str(captioned_pictures(tmp_path, PICTURES)), templates=TEMPLATES)


def zero_shot_top1(model: DualEncoder, data: ZeroShotConfig) -> float:
    return validate_dual_encoder(model, ValidationConfig(zero_shot=data))["zero_shot_top1"]


@torch.no_grad()
def image_embedding(model: DualEncoder, path: Path) -> Tensor:
    return model.encode_image(model.image_processor(open_image(path)))[0]


@torch.no_grad()
def text_embedding(model: DualEncoder, text: str) -> Tensor:
    return model.encode_text(model.tokenizer(text))[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_zero_shot_by_hand(model: DualEncoder, data: ZeroShotConfig) -> None:
    folder = Path(data.path).parent
    classes = [f"a {name} picture" for name in COLOURS]
    means = {
        name: torch.stack(
            [text_embedding(model, template.replace("{}", name)) for template in TEMPLATES]
        ).mean(0)
        for name in classes
    }
    right = 0
    for number in range(PICTURES):
        image = image_embedding(model, folder / f"{number}.png")
        best = max(classes, key=lambda name: cosine(image, means[name]))
        right += best == classes[number % len(classes)]
    assert 0 < right < PICTURES  # a score that could be wrong in both directions
    assert zero_shot_top1(model, data) == pytest.approx(right / PICTURES)


def hits(query: Tensor, gallery: Sequence[Tensor], own: set[int], k: int) -> bool:
    ranked = sorted(range(len(gallery)), key=lambda index: -cosine(query, gallery[index]))
    return bool(own & set(ranked[:k]))


def test_retrieval_by_hand(model: DualEncoder, data: ZeroShotConfig) -> None:
    folder = Path(data.path).parent
    with Path(data.path).open("a") as table:  # the first three pictures have two captions
        table.writelines(f"{number}.png,number {number} of all\n" for number in range(3))
    captions = [
        f"a {list(COLOURS)[number % len(COLOURS)]} picture number {number}" for number in range(PICTURES)
    ]
    rows = [(number, caption) for number, caption in enumerate(captions)]
    rows += [(number, f"number {number} of all") for number in range(3)]
    lines = ["image,caption", *(f"{number}.png,{caption}" for number, caption in rows)]
    Path(data.path).write_text("\n".join(lines) + "\n")

    images = [image_embedding(model, folder / f"{number}.png") for number in range(PICTURES)]
    texts = [text_embedding(model, caption) for _, caption in rows]
    # several batches, the last one short
    found = validate_dual_encoder(model, ValidationConfig(retrieval=data, batch_size=4))
    for k in (1, 5, 10):
        to_text = [
            hits(image, texts, {index for index, (owner, _) in enumerate(rows) if owner == number}, k)
            for number, image in enumerate(images)
        ]
        to_image = [hits(text, images, {owner}, k) for text, (owner, _) in zip(texts, rows, strict=True)]
        assert found[f"image_to_text_r{k}"] == pytest.approx(sum(to_text) / PICTURES)
        assert found[f"text_to_image_r{k}"] == pytest.approx(sum(to_image) / len(rows))
    assert 0 < found["image_to_text_r5"] < 1
    assert 0 < found["text_to_image_r5"] < 1


def test_all_scores_that_are_asked_for_and_the_modes_kept(model: DualEncoder, data: ZeroShotConfig) -> None:
    assert validate_dual_encoder(model, ValidationConfig()) == {}
    probe = {"train": data, "test": data, "features": "both"}
    config = ValidationConfig(zero_shot=data, retrieval=data, linear_probe=probe)
    check_validation(config)
    for training in (True, False):
        model.train(training)
        model.text.eval()  # as a frozen part in training
        scores = validate_dual_encoder(model, config)
        assert model.training == model.tower.training == training
        assert not model.text.training
    model.eval()
    probes = {name for name in scores if name.startswith("linear_probe")}
    assert probes == {
        f"linear_probe{kind}_{score}"
        for kind in ("", "_patches")
        for score in ("top1", "mean_per_class_recall")
    }
    assert len(scores.keys() - probes) == 6 + 2
    for part in ({"zero_shot": data}, {"retrieval": data}, {"linear_probe": probe}):
        alone = validate_dual_encoder(model, ValidationConfig(**part))
        assert alone == {name: scores[name] for name in alone}


def test_an_error_leaves_the_mode_as_it_was(model: DualEncoder, data: ZeroShotConfig) -> None:
    (Path(data.path).parent / "4.png").unlink()
    model.train()
    with pytest.raises(DataError, match=r"row 5: picture .* does not exist"):
        zero_shot_top1(model, data.model_copy(update={"max_bad_share": 1.0}))
    assert model.training
    model.eval()


def test_classes_that_no_picture_has_still_compete(model: DualEncoder, data: ZeroShotConfig) -> None:
    classes = tuple(f"a {name} picture" for name in (*COLOURS, "black", "pink", "grey"))
    found = evaluate(model, ValidationConfig(zero_shot=data.model_copy(update={"classes": classes})))
    assert found.zero_shot is not None
    assert found.zero_shot.found.confusion.shape == (7, 7)
    assert found.zero_shot.data.classes == list(classes)
    assert int(found.zero_shot.found.confusion.sum()) == PICTURES
    assert {"zero_shot_top1", "zero_shot_top5", "zero_shot_mean_per_class_recall"} == found.scores.keys()


def test_held_out_data_are_checked_before_training(data: ZeroShotConfig) -> None:
    wrong = data.model_copy(update={"classes": ("a red picture", "cat")})
    with pytest.raises(DataError, match=r"train.csv: label 'a blue picture' is no class"):
        check_validation(ValidationConfig(zero_shot=wrong))
    for key in ("zero_shot", "retrieval"):
        with pytest.raises(DataError, match="does not exist"):
            check_validation(ValidationConfig(**{key: {"path": "absent.csv"}}))
    with pytest.raises(ConfigError, match=r"templates 'openai_8': no such file.*did you mean 'openai_80'"):
        check_validation(ValidationConfig(zero_shot=data.model_copy(update={"templates": "openai_8"})))
    with pytest.raises(ConfigError, match=r"templates must each hold one \{\}"):
        load_config(ValidationConfig, {"zero_shot": {"path": data.path, "templates": ["no mark"]}})


def test_weights_that_are_not_finite_are_an_error(data: ZeroShotConfig) -> None:
    broken = tiny_dual_encoder().eval()
    with torch.no_grad():
        next(broken.tower.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match="features of 11 of 11 pictures are not finite"):
        zero_shot_top1(broken, data)
