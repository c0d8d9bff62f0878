from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_vision.errors import ConfigError
from vlm_vision.train.align_config import ConversationConfig, Stage
from vlm_vision.train.deepspeed_engine import engine_settings
from vlm_vision.train.rules import Rule

pytest.importorskip("deepspeed")
# As LLaVA's scripts/zero2.json and zero3.json are, which Hugging Face's Trainer fills in.
LOSS_SCALE = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
LLAVA = {
    "fp16": {"enabled": "auto", **LOSS_SCALE, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def settings(path: Path | None, content: Any = None, **stage: Any) -> dict[str, Any]:
    if path is not None:
        path.write_text(json.dumps(content), encoding="utf-8")
    fields = {"lr": 1, "steps": 1, "batch_size": 8, "zero_stage": 3, "deepspeed": path and str(path), **stage}
    made = Stage(name="s", data=ConversationConfig(file="f"), learn=(Rule(match="*"),), **fields)
    return engine_settings(made, 2, 2, 8, 100)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
def test_nothing_is_left_auto(zero_stage: int, offload: str) -> None:
    if zero_stage < {"none": 0, "optimizer": 1, "parameters": 3}[offload]:
        pytest.skip("refused")
    assert '"auto"' not in json.dumps(settings(None, zero_stage=zero_stage, offload=offload))


def test_llavas_own_file_is_merged(tmp_path: Path) -> None:
    ours, merged = settings(None), settings(tmp_path / "zero3.json", LLAVA)
    assert '"auto"' not in json.dumps(merged)
    zero = merged["zero_optimization"]
    assert zero["overlap_comm"] is True
    assert zero["sub_group_size"] == 1e9
    assert zero["reduce_bucket_size"] == ours["zero_optimization"]["reduce_bucket_size"]
    assert merged["train_batch_size"] == 8
    assert merged["fp16"] == {"enabled": False, **LOSS_SCALE, "initial_scale_power": 16}


def test_a_name_and_its_alias_are_one_key(tmp_path: Path) -> None:
    zero = settings(tmp_path / "d.json", {"zero_optimization": {"max_live_parameters": 5}})[
        "zero_optimization"
    ]
    assert zero["stage3_max_live_parameters"] == 5
    assert "max_live_parameters" not in zero


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {}}, "did you mean 'zero_optimization'?"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean 'overlap_comm'?"),
        ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, "did you mean 'device'?"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
            "DeepSpeed refuses zero_optimization",
        ),
        ({"zero_optimization": {"stage": 2}}, "change the stage's zero_stage, or write 'auto'"),
        ({"zero_optimization": 3}, "zero_optimization must be an object, got 3"),
        (
            {"zero_optimization": {"sub_group_size": "auto"}},
            "sub_group_size is 'auto', which the stage has no",
        ),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "did you mean 'cpu_checkpointing'?"),
        ({"bf16": {"enabled": True}}, "change the stage's precision"),
        ({"train_batch_size": 16}, "the stage makes it 8"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer' is said by the stage's lr, betas and weight_decay"),
        ([], "must hold an object, got list"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings(tmp_path / "mine.json", content)
    assert said in str(error.value)
    assert "mine.json" in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        settings(None, deepspeed=str(tmp_path / "absent.json"))


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_what_goes_to_nvme_cannot_be_saved(tmp_path: Path, part: str) -> None:
    file = tmp_path / "d.json"
    content = {"zero_optimization": {part: {"device": "nvme", "nvme_path": str(tmp_path)}}}
    with pytest.raises(ConfigError) as refused:
        settings(file, content, save_every=2)
    for said in (str(file), f"zero_optimization.{part}.device", "'cpu'", "stage 's'", "save_every"):
        assert said in str(refused.value)
    assert settings(file, content)["zero_optimization"][part]["device"] == "nvme"
    content["zero_optimization"][part] = {"device": "cpu"}
    assert settings(file, content, save_every=2)["zero_optimization"][part]["device"] == "cpu"
