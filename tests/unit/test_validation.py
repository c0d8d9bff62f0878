"""Zero-shot accuracy and retrieval against the same scores spelled out pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tiny import COLOURS, captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import DataError
from vlm_vision.metrics import recall_at_k, top1_accuracy
from vlm_vision.preprocess import open_image
from vlm_vision.train import validation
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation import retrieval, validate_dual_encoder, zero_shot_top1
from vlm_vision.train.validation_config import ValidationConfig

PICTURES = 11
TEMPLATES = ("a photo of {}.", "{}", "one {} here")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return tiny_dual_encoder().eval()


@pytest.fixture
def data(tmp_path: Path) -> PairsConfig:
    return PairsConfig(path=str(captioned_pictures(tmp_path, PICTURES)), templates=TEMPLATES)


@torch.no_grad()
def image_embedding(model: DualEncoder, path: Path) -> Tensor:
    return model.encode_image(model.image_processor(open_image(path)))[0]


@torch.no_grad()
def text_embedding(model: DualEncoder, text: str) -> Tensor:
    return model.encode_text(model.tokenizer(text))[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_zero_shot_by_hand(model: DualEncoder, data: PairsConfig) -> None:
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


def test_retrieval_by_hand(model: DualEncoder, data: PairsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "BATCH_SIZE", 4)  # several batches, the last one short
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
    found = retrieval(model, data)
    for k in (1, 5):
        to_text = [
            hits(image, texts, {index for index, (owner, _) in enumerate(rows) if owner == number}, k)
            for number, image in enumerate(images)
        ]
        to_image = [hits(text, images, {owner}, k) for text, (owner, _) in zip(texts, rows, strict=True)]
        assert found[f"image_to_text_r{k}"] == pytest.approx(sum(to_text) / PICTURES)
        assert found[f"text_to_image_r{k}"] == pytest.approx(sum(to_image) / len(rows))
    assert 0 < found["image_to_text_r5"] < 1
    assert 0 < found["text_to_image_r5"] < 1


def test_all_scores_that_are_asked_for_and_the_mode_kept(model: DualEncoder, data: PairsConfig) -> None:
    assert validate_dual_encoder(model, ValidationConfig()) == {}
    for training in (True, False):
        model.train(training)
        scores = validate_dual_encoder(model, ValidationConfig(zero_shot=data, retrieval=data))
        assert model.training == training
    assert scores == {"zero_shot_top1": zero_shot_top1(model, data), **retrieval(model, data)}


def test_an_unreadable_held_out_picture_is_an_error(model: DualEncoder, data: PairsConfig) -> None:
    (Path(data.path).parent / "4.png").unlink()
    with pytest.raises(DataError, match=r"row 5: picture .* does not exist"):
        zero_shot_top1(model, data.model_copy(update={"max_bad_share": 1.0}))


def test_metrics() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.8, 0.7, 0.6]])
    assert top1_accuracy(scores, torch.tensor([0, 1, 2])) == pytest.approx(2 / 3)
    assert recall_at_k(scores, [[0], [2], [1, 2]], 1) == pytest.approx(1 / 3)
    assert recall_at_k(scores, [[0], [2], [1, 2]], 2) == pytest.approx(2 / 3)
    assert recall_at_k(scores, [[0], [2], [1, 2]], 10) == 1.0
