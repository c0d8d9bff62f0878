"""What a stage can be told: rates by part, schedules, offloading, adapters in 4 bits and apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import colour_records, tiny_llm, tiny_tower
from torch import nn

from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.optim import warmup_schedule
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import load_llm

pytest.importorskip("deepspeed")
PROJECTOR = {"match": "projector.*"}
LORA = {"match": "llm.*_proj.weight", "learn": "lora"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_llm(folder / "llm", hidden_size=64, intermediate_size=128)
    colour_records(folder, 16, text_only=2)
    tiny_tower().save_pretrained(folder / "tower")
    return folder


def config(data: Path, llm: Path | None = None, **stage: Any) -> AlignConfig:
    settings = {
        "name": "one",
        "data": {"file": str(data / "train.json"), "image_folder": str(data / "images"), "workers": 0},
        "learn": [PROJECTOR, {"match": "llm.*"}],
        "lr": 1e-2,
        "steps": 8,
        "batch_size": 8,
        "max_length": 64,
        "log_every": 1,
        **stage,
    }
    parts = {"tower": str(data / "tower"), "llm": str(llm or data / "llm"), "projector": "mlp2x_gelu"}
    return load_config(AlignConfig, {"model": parts, "stages": [settings]})


def curve(run: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(run / "one" / "metrics.jsonl")]


def tensors(model: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(model / part / "model.safetensors")


def rates(shape: Any, total: int, warmup: int, floor: float = 0.0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_schedule(optimizer, shape, total, warmup, floor)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules() -> None:
    assert rates("linear", 6, 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates("linear", 4, 0, floor=0.5) == pytest.approx([1, 0.875, 0.75, 0.625])
    assert rates("constant", 4, 2) == pytest.approx([0.5, 1, 1, 1])
    assert rates("cosine", 4, 0, floor=0.1)[2] == pytest.approx(0.55)


def test_warm_up_by_share_or_by_steps(data: Path) -> None:
    assert [config(data).stages[0].warm_steps(total) for total in (1, 100, 5197)] == [1, 3, 156]
    assert config(data, warmup_steps=7).stages[0].warm_steps(100) == 7
    assert config(data, warmup_steps=0).stages[0].warm_steps(100) == 0
    with pytest.raises(ConfigError, match="give the warm-up once"):
        config(data, warmup_steps=7, warmup=0.1)


def test_a_stage_runs_its_schedule(data: Path, tmp_path: Path) -> None:
    align(config(data, schedule="linear", warmup_steps=2, lr_floor=0.5, steps=6), tmp_path)
    assert curve(tmp_path, "lr") == pytest.approx([0.005, 0.01, 0.01, 0.00875, 0.0075, 0.00625])


def test_parts_have_rates_of_their_own_and_layers_a_range(data: Path, tmp_path: Path) -> None:
    """The first step of Adam moves every weight by its rate, whatever the gradient is."""
    blocks = "vision_tower.*.resblocks"
    rules = [
        PROJECTOR,
        {"match": f"{blocks}.1-1.*", "lr": 1e-4},
        {"match": "llm.*", "lr": 1e-3, "weight_decay": 0.5},
    ]
    align(config(data, learn=rules, steps=1, warmup_steps=0, zero_stage=0), tmp_path)
    before, after = load_file(data / "tower" / "model.safetensors"), tensors(tmp_path / "model", "tower")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert {name.split("resblocks.")[-1][:2] for name, size in moved.items() if size} == {"1."}
    assert max(moved.values()) == pytest.approx(1e-4, rel=1e-2)
    before, after = load_file(data / "llm" / "model.safetensors"), tensors(tmp_path / "model", "llm")
    weight = before["model.layers.0.mlp.up_proj.weight"]
    change = after["model.layers.0.mlp.up_proj.weight"] - weight * (1 - 1e-3 * 0.5)
    assert float(change.abs().max()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offloading_changes_where_and_not_what(
    data: Path, tmp_path: Path, zero_stage: int, offload: str
) -> None:
    kept = config(data, zero_stage=zero_stage)
    moved = config(data, zero_stage=zero_stage, offload=offload)
    align(kept, tmp_path / "kept")
    align(moved, tmp_path / "moved")
    # Measured equal.
    assert curve(tmp_path / "moved") == pytest.approx(curve(tmp_path / "kept"), abs=1e-5)


def test_a_users_own_json_is_run(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}), encoding="utf-8")
    align(config(data), tmp_path / "ours")
    align(config(data, deepspeed=str(path)), tmp_path / "mine")
    assert curve(tmp_path / "mine") == pytest.approx(curve(tmp_path / "ours"), abs=1e-6)
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket": 1000}}), encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'reduce_bucket_size'"):
        align(config(data, deepspeed=str(path)), tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, "offload 'optimizer' takes zero_stage 1 or more"),
        ({"offload": "parameters", "zero_stage": 2}, "offload 'parameters' takes zero_stage 3"),
        ({"quantise": "nf4", "zero_stage": 3, "precision": "bf16"}, "zero_stage 2 or less"),
        ({"quantise": "nf4"}, "set precision: bf16"),
        ({"quantise": "nf4", "precision": "bf16", "lora": {"variant": "dora"}}, "DoRA reads whole weights"),
        ({"schedule": "cosin"}, "schedule"),
    ],
)
def test_what_does_not_go_together_is_refused(data: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(data, **stage)
    assert said in str(error.value)


def test_adapters_are_kept_apart_as_peft_reads_them(data: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    align(config(data, learn=[PROJECTOR, LORA], lora={"rank": 4}, keep_adapters=True), tmp_path)
    merged, ids = load_llm(tmp_path / "model" / "llm"), torch.arange(5, 15)[None]
    apart = PeftModel.from_pretrained(load_llm(data / "llm"), tmp_path / "one" / "adapters")  # type: ignore[arg-type]
    plain = load_llm(data / "llm")(ids).logits.detach()
    # Worst difference measured: 2.4e-7.
    torch.testing.assert_close(apart(ids).logits, merged(ids).logits, atol=1e-5, rtol=0)
    assert float((plain - merged(ids).logits.detach()).abs().max()) > 1e-2
    with pytest.raises(ConfigError, match="no rule puts adapters on the language model"):
        align(config(data, keep_adapters=True), tmp_path / "none")


NF4 = {"learn": [PROJECTOR, LORA], "lora": {"rank": 4}, "quantise": "nf4", "precision": "bf16"}


def test_adapters_on_four_bits_learn_as_on_the_weights_that_these_stand_for(
    data: Path, tmp_path: Path
) -> None:
    """NF4 is only another way to keep weights: LoRA on what it stands for, in bf16, has the same losses."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stood_for = load_llm(data / "llm", dtype=torch.bfloat16)
    for name, layer in stood_for.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            kept = functional.quantize_4bit(layer.weight.data, compress_statistics=True, quant_type="nf4")
            layer.weight.data = functional.dequantize_4bit(*kept)
    shutil.copytree(data / "llm", tmp_path / "llm")
    stood_for.save_pretrained(tmp_path / "llm")
    align(config(data, **NF4, steps=16), tmp_path / "four")
    whole = {name: value for name, value in NF4.items() if name != "quantise"}
    align(config(data, **whole, steps=16), tmp_path / "whole")
    align(config(data, tmp_path / "llm", **whole, steps=16), tmp_path / "stood_for")
    four, plain, same = (curve(tmp_path / run) for run in ("four", "whole", "stood_for"))
    assert four == pytest.approx(same, rel=1e-4)  # measured equal
    assert four == pytest.approx(plain, rel=0.1)  # worst difference measured: 0.046
    assert four != plain


def test_adapters_learn_on_four_bits_and_merge_into_whole_weights(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    align(config(data, **NF4, steps=16, keep_adapters=True), tmp_path)
    losses = curve(tmp_path)
    assert losses[-1] < 0.7 * losses[0]
    before, after = load_file(data / "llm" / "model.safetensors"), tensors(tmp_path / "model", "llm")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    state = load_file(tmp_path / "one" / "adapters" / "adapter_model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    a, b = (state[f"base_model.model.{layer}.lora_{x}.weight"].float() for x in "AB")
    expected = before[f"{layer}.weight"] + 16 / 4 * b @ a
    # Worst difference measured: 5e-4, half a step of bfloat16.
    torch.testing.assert_close(after[f"{layer}.weight"].float(), expected, atol=2e-3, rtol=1e-2)
    with pytest.raises(ConfigError, match=r"is held in 4 bits and cannot learn; give 'llm.\*' `learn: lora`"):
        align(config(data, **{**NF4, "learn": [{"match": "llm.*"}]}), tmp_path / "full")
