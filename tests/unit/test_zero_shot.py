from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_vision import DualEncoder, ZeroShotClassifier, load_dual_encoder
from vlm_vision.errors import ConfigError, DataError, WeightsError

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CLASSES = ["cat", "dog", "{}", "traffic light"]


def model_of(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return load_dual_encoder(
        {"backbone": {"name": "open_clip", "architecture": ARCHITECTURE, "weights": "none"}}
    )


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return model_of()


def pictures(count: int) -> list[Image.Image]:
    return [
        Image.new("RGB", (20 + number, 16), (number * 40 % 256, 90, 255 - number)) for number in range(count)
    ]


def test_classes_are_ranked_by_probability(model: DualEncoder) -> None:
    classifier = ZeroShotClassifier(model, CLASSES, ("a photo of a {}.", "{}"))
    found = classifier.classify(pictures(3), top_k=10)
    assert [sorted(name for name, _ in row) for row in found] == [sorted(CLASSES)] * 3
    for row in found:
        scores = [score for _, score in row]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
    logits = classifier.logits(model.image_processor(pictures(3)))
    assert [row[0][0] for row in found] == [CLASSES[index] for index in logits.argmax(dim=1)]


def test_a_picture_made_of_its_class_embedding_gets_that_class(model: DualEncoder) -> None:
    classifier = ZeroShotClassifier(model, CLASSES)
    target = model.encode_image(model.image_processor(pictures(1)))
    embeddings = torch.nn.functional.normalize(torch.randn(4, 16), dim=-1)
    embeddings[2] = target[0].detach()
    placed = ZeroShotClassifier(model, CLASSES, class_embeddings=embeddings)
    assert placed.classify(pictures(1))[0][0][0] == CLASSES[2]
    assert not torch.equal(classifier.class_embeddings, embeddings)


def test_batches_do_not_change_the_answer(model: DualEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = ZeroShotClassifier(model, CLASSES)
    whole, parts = classifier.classify(pictures(7)), classifier.classify(pictures(7), batch_size=3)
    assert [row[0][0] for row in whole] == [row[0][0] for row in parts]
    assert "classify" in capsys.readouterr().err


def test_many_prompts_are_embedded_in_batches(model: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ZeroShotClassifier(model, CLASSES, ("{}", "a {}", "the {}")).class_embeddings
    monkeypatch.setattr("vlm_vision.text_embeddings.TEXT_BATCH_SIZE", 5)
    parts = ZeroShotClassifier(model, CLASSES, ("{}", "a {}", "the {}")).class_embeddings
    assert float((whole - parts).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["{}"], "there is no class"),
        (["cat", "dog", "cat"], ["{}"], r"\['cat'\] repeat"),
        (["cat"], [], "there are none"),
        (["cat"], ["a photo"], r"each hold one {}, but \['a photo'\]"),
        (["cat"], ["{} and {}"], "each hold one {}"),
    ],
)
def test_classes_and_templates_are_checked(
    model: DualEncoder, classes: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier(model, classes, templates)


def test_saved_classes_are_not_embedded_again(
    model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = ZeroShotClassifier(model, CLASSES, ("a {}", "{}"))
    classifier.save(tmp_path / "classes")
    with monkeypatch.context() as patched:
        patched.setattr(DualEncoder, "encode_text", None)
        again = ZeroShotClassifier.load(tmp_path / "classes", model)
    assert (again.classes, again.templates) == (CLASSES, ["a {}", "{}"])
    assert torch.equal(again.class_embeddings, classifier.class_embeddings)
    assert again.classify(pictures(2)) == classifier.classify(pictures(2))


def test_saved_classes_of_another_model_are_refused(model: DualEncoder, tmp_path: Path) -> None:
    ZeroShotClassifier(model, CLASSES).save(tmp_path / "classes")
    with pytest.raises(ConfigError, match="embedded by another model"):
        ZeroShotClassifier.load(tmp_path / "classes", model_of(seed=1))
    with pytest.raises(ConfigError, match="holds no embedded classes"):
        ZeroShotClassifier.load(tmp_path, model)
    (tmp_path / "classes" / "class_embeddings.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        ZeroShotClassifier.load(tmp_path / "classes", model)


def test_an_unreadable_picture_is_named(model: DualEncoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.jpg"):
        ZeroShotClassifier(model, CLASSES).classify([tmp_path / "absent.jpg"])


def test_a_fingerprint_tells_weights_and_preprocessing_apart(model: DualEncoder, tmp_path: Path) -> None:
    assert model.fingerprint() == model_of().fingerprint() != model_of(seed=1).fingerprint()
    model.save_pretrained(tmp_path / "model")
    assert DualEncoder.from_pretrained(tmp_path / "model").fingerprint() == model.fingerprint()
    squashed = load_dual_encoder(
        {
            "backbone": {
                "name": "open_clip",
                "architecture": ARCHITECTURE,
                "weights": "none",
                "preprocess": {"image_size": 16, "resize": "squash"},
            }
        }
    )
    squashed.load_state_dict(model.state_dict())
    assert squashed.fingerprint() != model.fingerprint()
    assert model_of().to(torch.bfloat16).fingerprint() != model.fingerprint()
