"""The table and the code of docs/projectors.md are true."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from tiny import CLIP_VISION

from vlm_vision.adapters import build_projector, list_projectors
from vlm_vision.adapters.catalogue import UNKNOWN, facts_table, list_facts
from vlm_vision.adapters.config import parse_projector
from vlm_vision.adapters.llava_files import to_llava
from vlm_vision.cli import main
from vlm_vision.config import load_config, read_yaml
from vlm_vision.errors import ConfigError
from vlm_vision.train.align_config import VlmConfig

PAGE = (Path(__file__).parents[1] / "docs" / "projectors.md").read_text(encoding="utf-8")
LLAVA = 1024, 4096, (24, 24)


def blocks(kind: str, section: str) -> list[str]:
    """Code of a section, by how its heading begins."""
    text = re.split(rf"^## {section}.*$", PAGE, flags=re.MULTILINE)[1].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def test_the_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["projectors", "--markdown"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == facts_table(*LLAVA)
    assert printed in PAGE, (
        "vlm-vision projectors --markdown prints another table than docs/projectors.md has"
    )
    rows = dict(re.findall(r"^\| `(\w+)` (.*)\|$", printed, re.MULTILINE))
    assert list(rows) == list_projectors()
    assert "| 576 | 20,979,712 " in rows["mlp"]  # mlp2x_gelu from CLIP-L to a 7B LLaVA


def test_every_config_tells_where_it_comes_from_and_counts_its_weights() -> None:
    for facts in list_facts(*LLAVA):
        assert UNKNOWN not in (facts.paper, facts.reference, facts.shape), facts.name
        assert facts.remark == "" or facts.name in ("identity", "qformer_text")  # which need to be told more
        config = parse_projector(facts.name)
        assert re.search(r"^ +Parameters: .+", str(type(config).__doc__), re.MULTILINE)


def test_the_list_says_why_a_projector_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    command = "projectors --in 64 --out 64 --grid 5x9"
    assert main(shlex.split(command)) == 0
    found = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:3] for line in found.out.splitlines()[1:]}
    assert rows["identity"] == ["45", "0"]
    assert rows["linear"] == ["45", "4,160"]
    assert rows["pixel_shuffle"] == [UNKNOWN, UNKNOWN]
    assert "pixel_shuffle: a grid of 5x9 patches does not divide" in found.err
    assert main(["projectors", "--grid", "24"]) == 2
    assert "must be rows x columns, as 24x24, not '24'" in capsys.readouterr().err


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (choose,), (llava, others) = blocks("python", "Choose one"), blocks("python", "From LLaVA")
    space = {"patches": torch.randn(1, 729, 1152), "wide_patches": torch.randn(1, 720, 1152)}
    for line in choose.splitlines():
        exec(line, space)
        for value in re.findall(r"config\.\w+\(.*\) +# (\d+)", line):
            assert eval(line.partition("#")[0], space) == int(value)
        for count in re.findall(r"-> \[B,(\d+),3584\]", line):
            assert space["tokens"].shape == (1, int(count), 3584)
    assert space["tokens"].shape == (1, 9 * 20, 3584)

    projector = build_projector("mlp2x_gelu", 32, 16, (24, 24))
    to_llava(projector, tmp_path)
    (tmp_path / "llava-v1.6-folder").mkdir()
    state = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    save_file(
        {**state, "model.image_newline": torch.randn(16)}, tmp_path / "llava-v1.6-folder/model.safetensors"
    )
    exec(llava, space)
    assert space["newline"].shape == (16,)
    assert space["fields"] == {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32}
    assert (tmp_path / "out" / "mm_projector.bin").is_file()

    (tmp_path / "honeybee").mkdir()
    with torch.random.fork_rng():
        weights = build_projector("c_abstractor", 1024, 4096, (24, 24)).state_dict()
    torch.save({f"abstractor.{name}": value for name, value in weights.items()}, "honeybee/pytorch_model.bin")
    exec(others, space)
    assert torch.equal(space["projector"].pos_emb, weights["pos_emb"])


def test_the_code_about_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vision = transformers.CLIPVisionConfig(**CLIP_VISION)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text)
    )
    model.save_pretrained("llava-1.5-7b-hf")
    space = {"model": model}
    (code,) = blocks("python", "From transformers")
    exec(code, space)
    assert any(name.endswith("linear_1.weight") for name in space["weights"])


def test_the_code_about_questions_and_fused_towers_fits() -> None:
    (config,), (code,) = (blocks(kind, "A projector that reads") for kind in ("yaml", "python"))
    assert parse_projector(yaml.safe_load(config)["model"]["projector"]).name == "qformer_text"
    ids = torch.arange(4).expand(2, 4)
    space = {"tokenizer": range(30), "patches": torch.randn(2, 576, 1024), "ids": ids}
    space |= {"mask": torch.ones_like(ids), "build_projector": build_projector}
    exec(code, space)
    assert space["tokens"].shape == (2, 32, 4096)
    (fused,) = blocks("yaml", "Cambrian")
    assert parse_projector(yaml.safe_load(fused)["model"]["projector"]).tokens_out((24, 24)) == 576


def test_the_config_and_the_error_of_the_page(tmp_path: Path) -> None:
    (config,) = blocks("yaml", "Choose one")
    (tmp_path / "align.yaml").write_text(config, encoding="utf-8")
    given = {"tower": "t", "llm": "l", **read_yaml(tmp_path / "align.yaml")["model"]}
    assert json.loads(load_config(VlmConfig, given).projector.model_dump_json())["target"] == [12, 12]
    with pytest.raises(ConfigError) as error:
        parse_projector({"name": "pixel_shuffle", "factor": 5}).tokens_out((24, 24))
    assert f"    {error.value}\n" in PAGE
