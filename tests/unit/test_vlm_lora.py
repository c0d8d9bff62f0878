"""Adapters exported apart from the language model compute, by transformers and peft alone, what merged do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CLIP_VISION, colour_records, tiny_llm
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from vlm_vision.cli import main
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.vlm import VisionLanguageModel

pytest.importorskip("deepspeed")
TOLERANCE = 1e-4  # of logits around 1; worst measured: 7.2e-7


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second stage puts adapters onto what its first left; a norm learns beside them."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_llm(folder / "llm", hidden_size=64, intermediate_size=128)
    colour_records(folder, 16)
    lora = [{"match": "llm.*_proj.weight", "learn": "lora"}, {"match": "llm.model.norm.weight"}]
    if request.param == "lora":  # DoRA's magnitudes cannot grow with the vocabulary
        lora.append({"match": "llm.lm_head.weight", "learn": "lora"})
    learn = {"whole": [{"match": "*"}], "adapters": [{"match": "projector.*"}, *lora]}
    stages = [
        {
            "name": name,
            "data": {
                "file": str(folder / "train.json"),
                "image_folder": str(folder / "images"),
                "workers": 0,
            },
            "learn": rules,
            "lora": {"rank": 4, "variant": request.param},
            "keep_adapters": name == "adapters",
            "lr": 1e-2,
            "steps": 4,
            "batch_size": 8,
            "max_length": 64,
        }
        for name, rules in learn.items()
    ]
    architecture = {"model_type": "clip_vision_model", **CLIP_VISION}
    tower = {"backbone": {"name": "transformers", "architecture": architecture, "weights": "none"}}
    model = {"tower": tower, "llm": str(folder / "llm"), "projector": "mlp2x_gelu"}
    align(load_config(AlignConfig, {"model": model, "stages": stages}), folder / "run")
    return folder / "run"


def export(run: Path, folder: Path, *options: str) -> Path:
    assert main(["export", str(run / "model"), *options, "-o", str(folder)]) == 0
    return folder


@torch.no_grad()
def test_transformers_and_peft_compute_what_merged_weights_do(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    merged_folder = export(run, tmp_path / "merged", "--to", "transformers")
    folder = export(run, tmp_path / "apart", "--to", "transformers", "--lora", "apart")
    is_dora = json.loads((folder / "adapter" / "adapter_config.json").read_text())["use_dora"]
    assert ("vLLM's --lora-modules" in capsys.readouterr().out) == (not is_dora)  # it serves no DoRA
    merged = LlavaForConditionalGeneration.from_pretrained(merged_folder).eval()
    base: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    image = base.config.image_token_id
    inputs = {
        "input_ids": torch.tensor([[2, 5, *[image] * 16, 9, 10]]),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }
    expected, without = merged(**inputs).logits, base(**inputs).logits
    learnt = float((expected - without).abs().max())
    whole = PeftModel.from_pretrained(base, folder / "adapter").eval()
    worst = float((whole(**inputs).logits - expected).abs().max())
    print(f"worst {worst:.1e}, adapters change {learnt:.1e}")
    assert worst <= TOLERANCE < 1e-2 < learnt
    names = {name.partition(":")[0] for name in load_file(folder / "adapter" / "adapter_model.safetensors")}
    assert all(".lora_" in name for name in names)
    adapted = {name.partition(".lora_")[0] for name in names}
    # vLLM takes the last part of a name for a layer that it serves adapters on.
    assert {name.rpartition(".")[2] for name in adapted} <= {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head",
    }  # fmt: skip
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {f"base_model.model.{name}" for name in settings["target_modules"]} == adapted
    assert not any("vision" in name for name in adapted)
    # Beneath lies what the first stage left, and beside the adapters what the second learnt as a whole.
    first = load_file(run / "whole" / "model" / "llm" / "model.safetensors")
    last = load_file(run / "model" / "llm" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    layer, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    assert torch.equal(written[f"language_model.{layer}"], first[layer])
    assert torch.equal(written[f"language_model.{norm}"], last[norm])
    assert not torch.equal(last[norm], first[norm])


@torch.no_grad()
def test_llavas_builder_finds_its_lora_files(run: Path, tmp_path: Path) -> None:
    """As `load_pretrained_model(FOLDER, BASE, "llava-lora")` puts them onto the base, with peft alone."""
    from peft import PeftModel

    folder = export(run, tmp_path / "llava-lora", "--to", "llava", "--lora", "apart")
    with pytest.raises(ConfigError, match="holds LoRA adapters, and no language model beneath them"):
        VisionLanguageModel.from_pretrained(folder)
    assert not list(folder.glob("model*.safetensors"))
    assert (folder / "vision_tower" / "config.json").is_file()
    base_name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base_name == str(run / "whole" / "model" / "llm")
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    assert all(name.startswith("base_model.model.") for name in beside)
    beside = {
        name.removeprefix("base_model.").removeprefix("model."): value for name, value in beside.items()
    }
    projector = {name for name in beside if name.startswith("model.mm_projector.")}
    assert beside.keys() - projector == {"model.norm.weight"}
    saved = load_file(run / "model" / "projector" / "model.safetensors")
    assert {name.removeprefix("model.mm_projector.") for name in projector} == saved.keys()
    base: Any = AutoModelForCausalLM.from_pretrained(base_name)
    base.load_state_dict({"model.norm.weight": beside["model.norm.weight"]}, strict=False)
    whole = PeftModel.from_pretrained(base, folder).merge_and_unload()
    ids = torch.arange(5, 15)[None]
    expected = AutoModelForCausalLM.from_pretrained(run / "model" / "llm")(ids).logits
    assert float((whole(ids).logits - expected).abs().max()) <= TOLERANCE


def test_what_cannot_be_told_apart_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--to", "transformers", "--lora", "apart", "-o", str(tmp_path / "out")]
    shutil.copytree(run / "model", tmp_path / "alone" / "model")
    assert main([*command, str(tmp_path / "alone" / "model")]) == 2
    assert "train with `keep_adapters: true`" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(run, other)
    shutil.rmtree(other / "model" / "llm")
    shutil.copytree(other / "whole" / "model" / "llm", other / "model" / "llm")  # as if learnt anew since
    assert main([*command, str(other / "model")]) == 2
    assert "does not hold the adapters that are merged" in capsys.readouterr().err
    settings = other / "adapters" / "adapters" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(run / "whole"), str(tmp_path / "gone")))
    assert main([*command, str(other / "model")]) == 2
    assert "what its adapters learnt on is not there" in capsys.readouterr().err
    assert main(["export", "open_clip:ViT-B-32", "--to", "clip", "--lora", "apart", "-o", "x"]) == 2
    assert "--lora apart is of a vision-language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
