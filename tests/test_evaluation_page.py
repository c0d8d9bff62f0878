"""The commands of docs/evaluation.md run as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from benchmark_layout import NAMES, sample, write_shard
from tiny import captioned_pictures, tiny_dual_encoder

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import save_projector
from vlm_vision.cli import main

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.strip().splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page mentions."""
    root = tmp_path_factory.mktemp("page")
    model = tiny_dual_encoder()
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(root / "tuned")
    save_projector(build_projector("linear", 64, 8, (4, 4)), root / "llava" / "projector")
    captioned_pictures(root / "pictures")
    header, *rows = (root / "pictures" / "train.csv").read_text().splitlines()
    for name in ("labelled.csv", "pairs.csv"):
        (root / name).write_text("\n".join([header, *(f"pictures/{row}" for row in rows)]) + "\n")
    for split in ("train", "test"):
        shard = [sample(number, str(number % 3), "cls") for number in range(12)]
        write_shard(root / "cars" / split / "0.tar", shard)
        (root / "cars" / split / "nshards.txt").write_text("1")
    (root / "cars" / "classnames.txt").write_text("\n".join(NAMES))
    data = "{path: pairs.csv}"
    (root / "run.yaml").write_text(
        f"model: base\nsteps: 2\ndata: {data}\nvalidation: {{zero_shot: {data}, retrieval: {data}}}\n"
    )
    (root / "runs" / "adapted").mkdir(parents=True)
    return root


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command, comments=True)
    assert program == "vlm-vision"
    assert main(arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    for option in ("-o", "--json", "--plot"):
        if option in arguments:
            written = folder / arguments[arguments.index(option) + 1]
            assert written.exists()
            assert written.suffix != ".json" or json.loads(written.read_text())


def test_the_code_of_the_page_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert (folder / "runs" / "adapted" / "report.html").stat().st_size > 10_000


def test_the_page_names_every_command_it_is_about() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"score", "merge", "drift"}
