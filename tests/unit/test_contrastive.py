"""The contrastive loop: what learns by recipe, exact resume, and every way it refuses to go on."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import RESNET, TOWER, captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision import DualEncoder, VisionTower, load_dual_encoder
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, DataError, VlmVisionError
from vlm_vision.train import objective
from vlm_vision.train.checkpoint import latest_checkpoint
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.learner import Learner
from vlm_vision.train.losses import info_nce_loss
from vlm_vision.train.pairs import Batch, EpochBatches, Pairs, TrainingPairs
from vlm_vision.train.recipes import choose_recipe
from vlm_vision.train.run import read_metrics

PICTURES, BATCH, PER_EPOCH = 18, 8, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    captioned_pictures(folder, PICTURES)
    tiny_dual_encoder().save_pretrained(folder / "model")
    return folder


def config(folder: Path, **changes: Any) -> ContrastiveConfig:
    tree: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"path": str(folder / "train.csv"), "templates": ["a photo of {}", "{}"]},
        "recipe": "scratch",
        "augment": {"crop_area": [0.5, 1.0], "brightness": 0.3, "flip": 0.5},
        "batch_size": BATCH,
        "steps": 6,
        "lr": 1e-3,
        "log_every": 1,
        "workers": 0,
        "report": False,
    }
    return load_config(ContrastiveConfig, {**tree, **changes})


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def curve(run: Path, *columns: str) -> list[tuple[float, ...]]:
    return [tuple(line[column] for column in columns) for line in read_metrics(run / "metrics.jsonl")]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the run in the step after `step`."""
    take = Learner.step

    def until(self: Learner, batch: Batch, number: int, **options: Any) -> Any:
        if number > step:
            raise KeyboardInterrupt
        return take(self, batch, number, **options)

    monkeypatch.setattr(Learner, "step", until)


# --- What a run leaves behind


def test_the_loss_falls_and_the_run_is_a_folder(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train_contrastive(config(data, steps=30, save_every=10), run)
    losses = [loss for (loss,) in curve(run, "loss")]
    assert losses[-1] < 0.7 * losses[0]
    assert result == {"loss": losses[-1]}
    assert load_config(ContrastiveConfig, run / "config.yaml") == config(data, steps=30, save_every=10)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_10", "step_20"]
    assert list((run / "tensorboard").iterdir())
    assert isinstance(VisionTower.from_pretrained(run / "model"), VisionTower)
    assert isinstance(DualEncoder.from_pretrained(run / "model"), DualEncoder)
    assert not (run / "bad_samples.jsonl").exists()


def test_metrics_tell_the_rate_that_was_used(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, steps=20, log_every=3, lr=0.01), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18, 20]
    expected = [
        0.01 * 0.5 * (1 + math.cos(math.pi * (step - 1 - 2) / 18)) for step in (3, 6, 9, 12, 15, 18, 20)
    ]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    for line in lines:
        assert line.keys() == {
            "step", "time", "loss", "grad_norm", "grad_norm_vision", "grad_norm_text", "grad_norm_other",
            "lr", "logit_scale", "accuracy", "samples_per_second", "data_wait", "duplicates",
            "truncated_captions", "memory_mb", "skipped_steps",
        }  # fmt: skip
        parts = (line["grad_norm_vision"], line["grad_norm_text"], line["grad_norm_other"])
        assert math.hypot(*parts) == pytest.approx(line["grad_norm"])
        assert 0 <= line["data_wait"] <= 1
        assert line["samples_per_second"] > 0
        assert 0 <= line["accuracy"] <= 1
        assert line["truncated_captions"] == 0


def test_a_caption_that_repeats_counts_as_often_as_it_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 pictures have 4 captions: the gradients are those of encoding every pair's own."""
    seen: dict[str, Tensor] = {}

    def keep(image: Tensor, text: Tensor, logit_scale: Tensor, **options: Any) -> Tensor:
        seen["image"], seen["text"] = image.detach(), text.detach()
        return info_nce_loss(image, text, logit_scale)

    settings = config(data, steps=1, data={"path": str(data / "train.csv")}, augment={})
    with monkeypatch.context() as patch:
        patch.setattr(objective, "info_nce_loss", keep)
        train_contrastive(settings, tmp_path / "run")
    model, pairs = DualEncoder.from_pretrained(data / "model"), Pairs(settings.data)
    training = TrainingPairs(pairs, model.image_processor, model.tokenizer, settings.augment, settings.seed)
    keys = next(iter(EpochBatches(PICTURES, BATCH, settings.seed, 0, 1, 0, 1)))
    pixels = model.image_processor.normalise(training._batch(keys).squares)
    texts = [pairs.captions(index)[0] for _, index in keys]
    assert len(set(texts)) < BATCH
    image, text, logit_scale = model(pixels, model.tokenizer(texts))
    assert torch.allclose(seen["text"], text, rtol=0, atol=1e-6)
    assert torch.allclose(seen["image"], image, rtol=0, atol=1e-6)
    info_nce_loss(image, text, logit_scale).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    nearest = (image @ text.T).argmax(dim=1).tolist()
    right = [texts[found] == own for found, own in zip(nearest, texts, strict=True)]
    ((logged_norm, accuracy),) = curve(tmp_path / "run", "grad_norm", "accuracy")
    assert logged_norm == pytest.approx(float(norm), rel=1e-5)  # worst measured: 1e-7
    assert accuracy == sum(right) / BATCH


def test_epochs_count_whole_batches(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, steps=None, epochs=1.5), tmp_path / "run")
    assert len(curve(tmp_path / "run", "step")) == 1.5 * PER_EPOCH


def test_held_out_scores_are_logged_on_the_way_and_at_the_end(data: Path, tmp_path: Path) -> None:
    pairs = {"path": str(data / "train.csv")}
    validation = {"zero_shot": pairs, "retrieval": pairs, "every": 2}
    result = train_contrastive(config(data, validation=validation), tmp_path / "run")
    scored = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "zero_shot_top1" in line]
    assert [line["step"] for line in scored] == [2, 4, 6]
    names = {f"{direction}_r{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert names | {"zero_shot_top1"} <= result.keys()
    assert {name: scored[-1][name] for name in result} == result


def test_scoring_on_the_way_changes_nothing(data: Path, tmp_path: Path) -> None:
    validation = {"zero_shot": {"path": str(data / "train.csv")}, "every": 2}
    for name, changes in (("with", {"validation": validation}), ("without", {})):
        lora = {"recipe": "lora", "lora": {"rank": 2, "dropout": 0.3}}
        train_contrastive(config(data, **lora, **changes), tmp_path / name)
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


# --- What learns


@pytest.mark.parametrize(
    ("pairs", "recipe", "reason"),
    [
        (1, "frozen_vision", "1 pairs are under 10,000"),
        (9_999, "frozen_vision", "9,999 pairs are under 10,000"),
        (10_000, "lora", "10,000 pairs are between 10,000 and 100,000"),
        (99_999, "lora", "99,999 pairs are between 10,000 and 100,000"),
        (100_000, "full", "100,000 pairs are 100,000 or more"),
        (10**9, "full", "1,000,000,000 pairs are 100,000 or more"),
    ],
)
def test_the_size_of_the_data_chooses_the_recipe(pairs: int, recipe: str, reason: str) -> None:
    assert choose_recipe("auto", pairs) == (recipe, reason)
    assert choose_recipe("scratch", pairs) == ("scratch", "asked for")


def changed(data: Path, run: Path, before: Path | None = None) -> set[str]:
    old = load_file((before or data) / "model" / "model.safetensors")
    return {name for name, tensor in weights(run).items() if not torch.equal(tensor, old[name])}


def test_auto_on_a_few_pairs_freezes_vision(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_contrastive(config(data, recipe="auto", lr=None), run)
    printed = capsys.readouterr().out
    assert "recipe 'frozen_vision': 18 pairs are under 10,000; peak learning rate 1e-05 (CoCa's" in printed
    assert "patch features that a VLM reads stay as they are" in printed

    names = changed(data, run)
    assert "tower.backbone.visual.proj" in names
    assert {name for name in names if name.startswith("tower.")} == {"tower.backbone.visual.proj"}
    text = {name for name in weights(run) if name.startswith("text.")}
    assert text <= names
    pixels = torch.randn(2, 3, 32, 32)
    before, after = (VisionTower.from_pretrained(folder / "model") for folder in (data, run))
    assert torch.equal(before(pixels), after(pixels))


@pytest.mark.parametrize("recipe", ["lora", "full", "scratch"])
def test_other_recipes_change_the_patch_features(recipe: str, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_contrastive(config(data, recipe=recipe), run)
    pixels = torch.randn(2, 3, 32, 32)
    before, after = (VisionTower.from_pretrained(folder / "model") for folder in (data, run))
    assert not torch.allclose(before(pixels), after(pixels), atol=1e-4)
    names = changed(data, run)
    linear = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    adapted = {name for name in weights(run) if name.endswith(linear)}
    assert names == (adapted | {"logit_scale"} if recipe == "lora" else set(weights(run)))


def test_rules_replace_the_recipe(data: Path, tmp_path: Path) -> None:
    rules = [{"match": "text.*"}, {"match": "text.ln_final.*", "lr": 0.0, "weight_decay": 0.0}]
    train_contrastive(config(data, rules=rules), tmp_path / "run")
    expected = {name for name in weights(tmp_path / "run") if name.startswith("text.")}
    assert changed(data, tmp_path / "run") == expected - {"text.ln_final.weight", "text.ln_final.bias"}


def test_a_rule_that_names_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rule 'txt\.\*' matches no parameter; did you mean 'text'"):
        train_contrastive(config(data, rules=[{"match": "txt.*"}]), tmp_path / "run")


@pytest.mark.parametrize("recipe", ["frozen_vision", "lora", "full"])
def test_batch_statistics_of_frozen_layers_do_not_move(recipe: str, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load_dual_encoder(RESNET).save_pretrained(tmp_path / "model")
    train_contrastive(config(data, model=str(tmp_path / "model"), recipe=recipe, steps=2), tmp_path / "run")
    names = changed(data, tmp_path / "run", before=tmp_path)
    statistics = {
        name for name in weights(tmp_path / "run") if name.endswith(("running_mean", "running_var"))
    }
    assert statistics
    assert names & statistics == (statistics if recipe == "full" else set())
    assert any(name.startswith("tower.") for name in names)
    if recipe == "frozen_vision":
        projection = {f"tower.backbone.visual.attnpool.c_proj.{part}" for part in ("weight", "bias")}
        assert {name for name in names if name.startswith("tower.")} == projection


def test_the_temperature_is_bounded(data: Path, tmp_path: Path) -> None:
    model = tiny_dual_encoder()
    for name, start, lowest, highest in (("high", 4.6, 0.0, 100.0), ("low", 0.01, 1.0, 100.0)):
        with torch.no_grad():
            model.logit_scale.fill_(start)
        model.save_pretrained(tmp_path / name)
        rules = [{"match": "logit_scale", "lr": 0.5}]
        train_contrastive(
            config(data, model=str(tmp_path / name), rules=rules, lr=0.5), tmp_path / f"{name}_run"
        )
        scales = [scale for (scale,) in curve(tmp_path / f"{name}_run", "logit_scale")]
        assert all(lowest <= scale <= highest * (1 + 1e-6) for scale in scales)


def test_bfloat16_keeps_weights_in_float32(data: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train_contrastive(config(data, precision=precision), tmp_path / precision)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    exact, rounded = (curve(tmp_path / precision, "loss") for precision in ("fp32", "bf16"))
    assert exact != rounded
    assert [loss for (loss,) in rounded] == pytest.approx([loss for (loss,) in exact], rel=0.05)


# --- Resume


LORA = {"recipe": "lora", "lora": {"rank": 2, "dropout": 0.3}}
RESUMES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "in the middle of an epoch": (3, {}, {}),
    "at the edge of an epoch": (4, {}, {}),
    "two workers, then none": (3, {"workers": 2}, {"workers": 0}),
    "lora with dropout": (3, LORA, LORA),
    "rates by group": (
        3,
        *[{"rules": [{"match": "*"}, {"match": "text.*", "lr": 1e-2, "weight_decay": 0.5}]}] * 2,
    ),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_is_bit_equal(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, before, after = RESUMES[case]
    through, killed = tmp_path / "through", tmp_path / "killed"
    train_contrastive(config(data, save_every=at, **after), through)
    with monkeypatch.context() as patch:
        stop_after(at + 1, patch)
        with pytest.raises(KeyboardInterrupt):
            train_contrastive(config(data, save_every=at, **before), killed)
    assert not (killed / "model").exists()
    assert len(curve(killed, "step")) == at + 1
    torch.manual_seed(99)  # nothing depends on the state that a new process starts with
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler")
        train_contrastive(config(data, save_every=at, **after), killed, resume=True)
    assert same(weights(killed), weights(through))
    columns = ("step", "loss", "grad_norm", "lr", "logit_scale", "accuracy")
    assert curve(killed, *columns) == curve(through, *columns)


def test_a_resumed_resnet_keeps_its_batch_statistics(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    load_dual_encoder(RESNET).save_pretrained(tmp_path / "model")
    settings = config(data, model=str(tmp_path / "model"), steps=4, save_every=2)
    train_contrastive(settings, tmp_path / "through")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            train_contrastive(settings, tmp_path / "killed")
    train_contrastive(settings, tmp_path / "killed", resume=True)
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "through"))


@pytest.fixture
def killed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of which the checkpoints of steps 2 and 4 are left."""
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train_contrastive(config(data, save_every=2), tmp_path / "run")
    return tmp_path / "run"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data: Path, killed: Path, tmp_path: Path) -> None:
    (killed / "checkpoints" / "step_4" / "optimizer.pt").write_bytes(b"torn")
    found = latest_checkpoint(killed / "checkpoints")
    assert found is not None
    assert found[0] == 2
    train_contrastive(config(data, save_every=2), killed, resume=True)
    train_contrastive(config(data, save_every=2), tmp_path / "through")
    assert same(weights(killed), weights(tmp_path / "through"))


def test_what_a_checkpoint_does_not_fit_is_refused(data: Path, killed: Path) -> None:
    with pytest.raises(ConfigError, match="other parameters learnt there than in this config"):
        train_contrastive(config(data, recipe="frozen_vision"), killed, resume=True)
    with pytest.raises(ConfigError, match="is at step 4, and this config ends at 3: train longer"):
        train_contrastive(config(data, steps=3), killed, resume=True)
    assert load_config(ContrastiveConfig, killed / "config.yaml") == config(data, save_every=2)


def test_a_used_folder_is_refused(data: Path, killed: Path) -> None:
    before = (killed / "metrics.jsonl").read_text()
    with pytest.raises(DataError, match="already holds a checkpoint of step 4: continue it with --resume"):
        train_contrastive(config(data), killed)
    assert (killed / "metrics.jsonl").read_text() == before
    train_contrastive(config(data), killed, resume=True)
    for path in (killed / "checkpoints").iterdir():
        path.rename(killed / path.name)
    with pytest.raises(DataError, match="already holds a trained model"):
        train_contrastive(config(data), killed)


# --- What it does not go on with


def poison(value: float) -> Callable[..., Tensor]:
    calls = []

    def loss(image: Tensor, text: Tensor, logit_scale: Tensor, **options: Any) -> Tensor:
        calls.append(1)
        return (image.sum() + text.sum()) * logit_scale * (value if len(calls) == 4 else 1e-3)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights(
    value: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "info_nce_loss", poison(value))
    with pytest.raises(VlmVisionError, match=r"step 4: .* weights are as after step 3"):
        train_contrastive(config(data, save_every=3), tmp_path / "run")
    assert len(curve(tmp_path / "run", "step")) == 3
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_3" / "learnt.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def broken_data(folder: Path) -> Path:
    captioned_pictures(folder, PICTURES)
    (folder / "5.png").write_bytes(b"<html>")
    (folder / "11.png").unlink()
    return folder / "train.csv"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_is_named_without_a_traceback(workers: int, data: Path, tmp_path: Path) -> None:
    pairs = {"path": str(broken_data(tmp_path / "data"))}
    with pytest.raises(DataError, match=r"train\.csv, row (6|12): ") as caught:
        train_contrastive(config(data, data=pairs, workers=workers), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_unreadable_pictures_are_listed_once_and_bounded(data: Path, tmp_path: Path) -> None:
    path = str(broken_data(tmp_path / "data"))
    pairs = {"path": path, "max_bad_share": 2 / PICTURES}
    train_contrastive(config(data, data=pairs, steps=4 * PER_EPOCH), tmp_path / "run")
    listed = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["error"].split(":")[0] for line in listed) == [
        f"{path}, row 12",
        f"{path}, row 6",
    ]

    pairs["max_bad_share"] = 1 / PICTURES
    with pytest.raises(
        DataError, match=r"2 samples cannot be read, max_bad_share allows 1; they are listed in"
    ):
        train_contrastive(config(data, data=pairs, steps=4 * PER_EPOCH), tmp_path / "second")


def test_long_captions_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captioned_pictures(tmp_path / "data", BATCH)
    table = tmp_path / "data" / "train.csv"
    table.write_text(table.read_text().replace("picture", "very " * 20 + "long picture", 2))
    train_contrastive(config(data, data={"path": str(table)}, steps=3), tmp_path / "run")
    assert "6 of 24 captions were longer than the text tower's 16 tokens" in capsys.readouterr().out
    assert curve(tmp_path / "run", "truncated_captions") == [(0.25,)] * 3


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 100}, DataError, "18 pictures, fewer than one batch of 100: lower batch_size"),
        ({"model": "open_clip:ViT-B-33@none"}, ConfigError, "did you mean 'ViT-B-32'"),
        (
            {"validation": {"zero_shot": {"path": "absent.csv"}}},
            DataError,
            r"data file 'absent\.csv' does not exist",
        ),
    ],
)
def test_input_that_does_not_fit(
    changes: dict[str, Any], error: type[Exception], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        train_contrastive(config(data, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "give the length of the run once"),
        ({"epochs": 3}, "give the length of the run once"),
        ({"recipe": "lorra"}, "recipe: .*did you mean 'lora'"),
        ({"seed": -1}, "seed: "),
        ({"learning_rate": 1.0}, r"learning_rate: unknown key"),
    ],
)
def test_configs_that_make_no_sense(changes: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(data, **changes)


def test_a_tower_node_is_a_model_too(data: Path, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    for run, seed in ((first, 0), (second, 1)):
        train_contrastive(config(data, model=TOWER, steps=1, seed=seed), run)
    assert not same(weights(first), weights(second))  # random weights follow the seed
