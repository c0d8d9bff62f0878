"""Options of the contrastive loop: each does what it says, and what does not go together is refused."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from duals import COCA
from safetensors.torch import load_file
from tiny import RESNET, captioned_pictures, tiny_dual_encoder
from torch import Tensor

from vlm_vision import DualEncoder, VisionTower, load_dual_encoder
from vlm_vision.adapters import load_adapter
from vlm_vision.backbones.open_clip import VitBackbone
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, VlmVisionError
from vlm_vision.train import learner as learner_module
from vlm_vision.train.checkpoint import latest_checkpoint
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.depth import depths, text_blocks, vision_blocks
from vlm_vision.train.learner import Learner
from vlm_vision.train.optim import parameter_groups
from vlm_vision.train.prepared import prepare_model
from vlm_vision.train.recipes import choose_recipe
from vlm_vision.train.run import read_metrics
from vlm_vision.train.termination import TERMINATED

PICTURES, BATCH = 18, 8
FIXED = {"crop_area": [1.0, 1.0], "aspect": [1.0, 1.0]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    captioned_pictures(folder, PICTURES)
    tiny_dual_encoder().save_pretrained(folder / "model")
    return folder


def config(folder: Path, **changes: Any) -> ContrastiveConfig:
    tree: dict[str, Any] = {
        "model": str(folder / "model"),
        "data": {"path": str(folder / "train.csv")},
        "recipe": "scratch",
        "batch_size": BATCH,
        "steps": 4,
        "lr": 1e-3,
        "log_every": 1,
        "workers": 0,
        "report": False,
    }
    return load_config(ContrastiveConfig, {**tree, **changes})


def weights(run: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / name / "model.safetensors")


def curve(run: Path, column: str) -> list[float]:
    return [line[column] for line in read_metrics(run / "metrics.jsonl") if column in line]


def changed(data: Path, run: Path) -> set[str]:
    old = weights(data)
    return {name for name, tensor in weights(run).items() if not torch.equal(tensor, old[name])}


def worst_difference(first: Path, second: Path) -> float:
    one, two = weights(first), weights(second)
    return max(float((one[name] - tensor).abs().max()) for name, tensor in two.items())


# --- Micro-batches


def test_cached_micro_batches_train_as_the_whole_batch_does(data: Path, tmp_path: Path) -> None:
    for name, size in (("whole", None), ("cached", 3)):
        train_contrastive(config(data, micro_batch_size=size), tmp_path / name)
    assert curve(tmp_path / "cached", "loss") == pytest.approx(curve(tmp_path / "whole", "loss"), rel=1e-4)
    norms = [curve(tmp_path / name, "grad_norm") for name in ("cached", "whole")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # worst measured: 2e-6
    assert curve(tmp_path / "cached", "accuracy") == curve(tmp_path / "whole", "accuracy")


def test_plain_accumulation_has_only_the_negatives_of_its_part(data: Path, tmp_path: Path) -> None:
    for name, cached in (("plain", False), ("cached", True)):
        settings = {"micro_batch_size": 2, "cached_gradients": cached}
        train_contrastive(config(data, steps=1, **settings), tmp_path / name)
    plain, cached = (curve(tmp_path / name, "loss")[0] for name in ("plain", "cached"))
    assert plain < math.log(2) * 1.2  # of two pairs
    assert cached > plain + 0.5  # of eight


def test_batch_statistics_are_no_chunks_of_a_batch(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"statistics of its batch .*leave micro_batch_size out"):
        train_contrastive(config(data, model=RESNET, micro_batch_size=2), tmp_path / "run")
    load_dual_encoder(RESNET).save_pretrained(tmp_path / "model")
    frozen = config(data, model=str(tmp_path / "model"), recipe="lit", micro_batch_size=2)
    train_contrastive(frozen, tmp_path / "run")


# --- Losses


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "siglip"},
        {"directions": "sum", "tile_size": 3},
        {"duplicates": "positive"},
        {"duplicates": "negative"},
        {"patch_weight": 1.0},
        {"keep": {"weight": 10.0}},
        {"distill": {"teacher": "the model itself"}},
    ],
    ids=lambda loss: "-".join(loss),
)
def test_every_loss_falls_and_resumes_bit_equal(
    loss: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "distill" in loss:
        loss = {"distill": {"teacher": str(data / "model"), "weight": 0.5}}
    settings = config(data, loss=loss, steps=12, save_every=6, micro_batch_size=5, ema=0.5)
    train_contrastive(settings, tmp_path / "through")
    losses = curve(tmp_path / "through", "loss")
    assert losses[-1] < losses[0]
    take = Learner.step
    with monkeypatch.context() as patch:
        patch.setattr(
            Learner,
            "step",
            lambda self, batch, number, **options: (
                take(self, batch, number, **options) if number < 8 else 1 / 0
            ),
        )
        with pytest.raises(ZeroDivisionError):
            train_contrastive(settings, tmp_path / "killed")
    train_contrastive(settings, tmp_path / "killed", resume=True)
    assert curve(tmp_path / "killed", "loss") == losses
    for name in ("model", "model_ema"):
        through, killed = weights(tmp_path / "through", name), weights(tmp_path / "killed", name)
        assert all(torch.equal(killed[key], tensor) for key, tensor in through.items())


def test_a_sigmoid_loss_gives_the_model_a_bias_for_its_batch_size(data: Path) -> None:
    prepared = prepare_model(config(data, loss={"name": "siglip"}, batch_size=256), 18)
    assert prepared.model.logit_bias is not None
    assert float(prepared.model.logit_bias.detach()) == pytest.approx(-math.log(255))
    given = {"init": 10.0, "bias_init": -2.71}
    prepared = prepare_model(config(data, loss={"name": "siglip"}, temperature=given), 18)
    assert float(prepared.model.logit_bias.detach()) == pytest.approx(-2.71)
    assert float(prepared.model.logit_scale.detach().exp()) == pytest.approx(10.0)


def test_a_bias_is_saved_and_loaded(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, loss={"name": "siglip"}), tmp_path / "run")
    model = DualEncoder.from_pretrained(tmp_path / "run" / "model")
    assert model.logit_bias is not None
    assert float(model.logit_bias.detach()) != pytest.approx(-math.log(7), abs=1e-6)


def test_kept_features_stay_nearer(data: Path, tmp_path: Path) -> None:
    pixels = torch.randn(4, 3, 32, 32)
    before = VisionTower.from_pretrained(data / "model")(pixels)
    moved = {}
    for name, loss in (("free", {}), ("kept", {"keep": {"weight": 100.0}})):
        train_contrastive(config(data, steps=20, loss=loss), tmp_path / name)
        after = VisionTower.from_pretrained(tmp_path / name / "model")(pixels)
        moved[name] = float((after - before).norm() / before.norm())
    assert moved["kept"] < 0.5 * moved["free"]


def test_features_are_kept_on_other_pictures_too(data: Path, tmp_path: Path) -> None:
    captioned_pictures(tmp_path / "replay", 6)
    keep = {"weight": 5.0, "data": {"path": str(tmp_path / "replay" / "train.csv")}, "batch_size": 4}
    train_contrastive(config(data, loss={"keep": keep}, micro_batch_size=3), tmp_path / "run")
    assert all(math.isfinite(loss) for loss in curve(tmp_path / "run", "loss"))


def test_a_teacher_of_another_size_teaches(data: Path, tmp_path: Path) -> None:
    tree = {"backbone": {**RESNET["backbone"]}, "image_size": 64}
    load_dual_encoder(tree).save_pretrained(tmp_path / "teacher")
    loss = {"distill": {"teacher": str(tmp_path / "teacher"), "weight": 1.0}}
    train_contrastive(config(data, loss=loss), tmp_path / "run")
    assert all(math.isfinite(value) for value in curve(tmp_path / "run", "loss"))


def test_a_decoder_learns_to_caption(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    load_dual_encoder({"backbone": {**COCA, "weights": "none"}}).save_pretrained(tmp_path / "coca" / "model")
    settings = {"model": str(tmp_path / "coca" / "model"), "steps": 12}
    for name, size in (("whole", None), ("cached", 3)):
        changes = {"loss": {"caption_weight": 2.0}, "micro_batch_size": size}
        train_contrastive(config(data, **settings, **changes), tmp_path / name)
    losses = curve(tmp_path / "whole", "loss")
    assert losses[-1] < losses[0]
    assert curve(tmp_path / "cached", "loss") == pytest.approx(losses, rel=1e-3)
    names = changed(tmp_path / "coca", tmp_path / "whole")
    assert any(name.startswith("text_decoder.") for name in names)
    train_contrastive(config(data, **settings), tmp_path / "without")
    names = changed(tmp_path / "coca", tmp_path / "without")
    assert not any(name.startswith("text_decoder.") for name in names)
    with pytest.raises(ConfigError, match=r"no text decoder; a CoCa has one"):
        train_contrastive(config(data, loss={"caption_weight": 1.0}), tmp_path / "none")


def test_hard_negatives_make_the_loss_harder(data: Path, tmp_path: Path) -> None:
    captioned_pictures(tmp_path / "data", PICTURES)
    table = tmp_path / "data" / "train.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},wrong", *(f"{row},a plain wall" for row in rows)]))
    pairs = {"path": str(table), "negative_column": "wrong"}
    for name, takes_part in (("with", True), ("without", False)):
        changes = {"data": pairs, "loss": {"hard_negatives": takes_part}, "steps": 1, "micro_batch_size": 3}
        train_contrastive(config(data, **changes), tmp_path / name)
    assert curve(tmp_path / "with", "loss")[0] > curve(tmp_path / "without", "loss")[0] + 0.1


# --- What learns


def test_adapters_are_saved_and_go_onto_the_start_again(data: Path, tmp_path: Path) -> None:
    lora = {"recipe": "lora", "lora": {"rank": 2, "variant": "rslora", "targets": ["q", "v", "mlp"]}}
    train_contrastive(config(data, **lora), tmp_path / "run")
    model = DualEncoder.from_pretrained(data / "model")
    load_adapter(model, tmp_path / "run" / "adapter")
    expected = weights(tmp_path / "run")
    worst = max(float((tensor - expected[name]).abs().max()) for name, tensor in model.state_dict().items())
    assert worst < 1e-6  # worst measured: 3e-8
    resumed = load_dual_encoder(data / "model")
    train_contrastive(config(data, **lora, save_every=2), tmp_path / "saved")
    load_adapter(resumed, tmp_path / "saved" / "checkpoints" / "step_2")


def test_locked_images_train_the_text_tower_alone(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, recipe="lit", steps=2), tmp_path / "run")
    names = changed(data, tmp_path / "run")
    assert {name.split(".")[0] for name in names} == {"text", "logit_scale"}


@pytest.mark.parametrize(("count", "changes"), [(1, False), (2, True)])
def test_last_blocks_and_what_it_means_for_a_vlm(
    count: int, changes: bool, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_contrastive(config(data, recipe="last_n", last_n=count), tmp_path / "run")
    names = changed(data, tmp_path / "run")
    blocks = {
        name.split("resblocks.")[1][0] for name in names if name.startswith("tower.") and "resblocks" in name
    }
    assert blocks == {str(number) for number in range(3 - count, 3)}
    assert "tower.backbone.visual.proj" in names
    assert ("stay as they are" in capsys.readouterr().out) != changes
    pixels = torch.randn(2, 3, 32, 32)
    before, after = (
        VisionTower.from_pretrained(folder / "model")(pixels) for folder in (data, tmp_path / "run")
    )
    assert torch.equal(before, after) != changes


def test_for_a_vlm_features_change_or_the_run_is_refused(data: Path, tmp_path: Path) -> None:
    assert choose_recipe("auto", 18, for_vlm=True)[0] == "lora"
    settings = config(data, recipe="auto", for_vlm=True, lr=None)
    assert settings.loss_of_run().patch_weight == 1.0
    assert config(data, for_vlm=True, loss={"patch_weight": 0.0}).loss_of_run().patch_weight == 0
    train_contrastive(settings, tmp_path / "run")
    pixels = torch.randn(2, 3, 32, 32)
    before, after = (
        VisionTower.from_pretrained(folder / "model")(pixels) for folder in (data, tmp_path / "run")
    )
    assert not torch.equal(before, after)
    for recipe in ("frozen_vision", "lit"):
        with pytest.raises(ConfigError, match=f"recipe '{recipe}' leaves the patch features"):
            prepare_model(config(data, recipe=recipe, for_vlm=True), 18)
    with pytest.raises(ConfigError, match="raise last_n"):
        prepare_model(config(data, recipe="last_n", last_n=1, for_vlm=True), 18)


def test_layer_decay_counts_blocks_from_the_top(data: Path) -> None:
    prepared = prepare_model(config(data), 18)
    model = prepared.model
    assert [name.rpartition(".")[2] for name in vision_blocks(model)] == ["0", "1", "2"]
    assert [name.rpartition(".")[2] for name in text_blocks(model)] == ["0", "1"]
    found = depths(model)
    visual = "tower.backbone.visual"
    assert found[f"{visual}.transformer.resblocks.2.mlp.c_fc.weight"] == 1
    assert found[f"{visual}.transformer.resblocks.0.ln_1.weight"] == 3
    assert found[f"{visual}.conv1.weight"] == found[f"{visual}.class_embedding"] == 4
    assert found[f"{visual}.proj"] == found[f"{visual}.ln_post.weight"] == found["logit_scale"] == 0
    assert found["text.token_embedding.weight"] == 3
    assert found["text.text_projection"] == 0
    groups = parameter_groups(model, prepared.rules, lr=1.0, weight_decay=0.1, depths=found, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_a_temperature_of_its_own(data: Path, tmp_path: Path) -> None:
    still = config(data, temperature={"learns": False, "init": 20.0})
    train_contrastive(still, tmp_path / "still")
    assert curve(tmp_path / "still", "logit_scale") == pytest.approx([20.0] * 4)
    quick = config(data, temperature={"lr": 1.0, "max": 30.0, "init": 20.0})
    train_contrastive(quick, tmp_path / "quick")
    assert curve(tmp_path / "quick", "logit_scale")[-1] != pytest.approx(20.0, rel=0.05)
    assert max(curve(tmp_path / "quick", "logit_scale")) <= 30.0 * (1 + 1e-6)


# --- Cost


@pytest.mark.parametrize("recipe", ["lit", "frozen_vision"])
def test_a_frozen_tower_runs_once_for_each_picture(
    recipe: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = VitBackbone.forward_layers

    def counted(self: VitBackbone, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        seen.append(len(pixels))
        return forward(self, pixels, layers)

    settings = config(data, recipe=recipe, steps=10, augment=FIXED)
    with monkeypatch.context() as patch:
        patch.setattr(VitBackbone, "forward_layers", counted)
        train_contrastive(settings, tmp_path / "cached")
        assert sum(seen) <= PICTURES
        patch.setattr(learner_module.EmbeddingCache, "for_images", lambda *arguments: None)
        train_contrastive(settings, tmp_path / "again")
    assert sum(seen) > 4 * PICTURES
    assert curve(tmp_path / "cached", "loss") == pytest.approx(curve(tmp_path / "again", "loss"), rel=1e-5)
    assert ("tower.backbone.visual.proj" in changed(data, tmp_path / "cached")) == (recipe == "frozen_vision")


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"precision": "bf16", "checkpoint_activations": True},
        {"optimizer": "adamw_8bit"},
        {"layer_decay": 0.7},
        {"patch_dropout": 0.5},
        {"compile": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_train(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, steps=12, **changes), tmp_path / "run")
    losses = curve(tmp_path / "run", "loss")
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_the_end_of_a_run_sees_every_patch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    take = Learner._set_patch_dropout

    def note(self: Learner, number: int) -> None:
        take(self, number)
        dropout = self.objective.model.tower.backbone.visual.patch_dropout
        shares.append(float(getattr(dropout, "prob", 0.0)))

    monkeypatch.setattr(Learner, "_set_patch_dropout", note)
    train_contrastive(config(data, steps=10, patch_dropout=0.5, unmasked_tail=0.3), tmp_path / "run")
    assert shares == [0.5] * 7 + [0.0] * 3


def test_an_average_of_weights(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, steps=3, ema=0.5, save_every=1), tmp_path / "run")
    steps = [weights(data)]
    for number in (1, 2):  # the last step is the model itself
        path = tmp_path / "run" / "checkpoints" / f"step_{number}"
        steps.append({**steps[-1], **load_file(path / "learnt.safetensors")})
    steps.append(weights(tmp_path / "run"))
    name = "tower.backbone.visual.proj"
    average = steps[0][name]
    for number in (1, 2, 3):
        average = average.lerp(steps[number][name], 0.5)
    found = weights(tmp_path / "run", "model_ema")[name]
    assert torch.allclose(found, average, rtol=0, atol=1e-7)


# --- Stops and saves


def test_sigterm_saves_and_the_run_goes_on_from_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Learner.step

    def send(self: Learner, batch: Any, number: int, **options: Any) -> Any:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batch, number, **options)

    train_contrastive(config(data), tmp_path / "through")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", send)
        with pytest.raises(SystemExit) as stopped:
            train_contrastive(config(data), tmp_path / "stopped")
    assert stopped.value.code == TERMINATED == 143
    found = latest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert found is not None
    assert found[0] in (2, 3)
    train_contrastive(config(data), tmp_path / "stopped", resume=True)
    assert worst_difference(tmp_path / "stopped", tmp_path / "through") == 0


def test_checkpoints_by_time_and_how_many_stay(data: Path, tmp_path: Path) -> None:
    train_contrastive(config(data, save_minutes=1e-9, keep_checkpoints=3, steps=6), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_3", "step_4", "step_5"]


def test_the_best_model_is_kept(data: Path, tmp_path: Path) -> None:
    validation = {"retrieval": {"path": str(data / "train.csv")}, "every": 2}
    settings = config(data, validation=validation, best_by="text_to_image_r1", steps=6)
    train_contrastive(settings, tmp_path / "run")
    assert isinstance(DualEncoder.from_pretrained(tmp_path / "run" / "best"), DualEncoder)
    wrong = config(data, validation=validation, best_by="text_to_image_r3", steps=6)
    with pytest.raises(
        ConfigError, match=r"best_by 'text_to_image_r3' is no score .*did you mean 'text_to_image_r"
    ):
        train_contrastive(wrong, tmp_path / "wrong")


def test_what_is_not_finite_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Learner._forward

    def poisoned(self: Learner, **inputs: Any) -> dict[str, Tensor]:
        outputs = encode(self, **inputs)
        outputs["image"] = outputs["image"].clone()
        outputs["image"][2] = math.nan
        return outputs

    monkeypatch.setattr(Learner, "_forward", poisoned)
    with pytest.raises(
        VlmVisionError, match=r"step 1: .*not finite come from \S+train\.csv, row \d+: \d+\.png\. Lower"
    ):
        train_contrastive(config(data), tmp_path / "run")


def test_options_that_do_not_go_together(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.keep compares patch by patch"):
        config(data, patch_dropout=0.5, loss={"keep": {}})
