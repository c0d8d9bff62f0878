"""The commands and the config of docs/data.md run as they stand, on data such as its text tells of."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_vision.cli import main
from vlm_vision.config import load_config
from vlm_vision.train.data_pack import pack_data
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import DataNode, PairsConfig, source_nodes

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["image,caption"]
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
        lines.append(f"{number}.jpg,noise of kind {number}")
        (tmp_path / "pictures" / f"kind_{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"kind_{number % 2}" / f"{number}.png")
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pack_data(PairsConfig(path=str(tmp_path / "pairs.csv")), tmp_path / "shards", shard_size=4)
    (config,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    commands = [shlex.split(line) for block in blocks("sh") for line in block.strip().splitlines()]
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    for name, *arguments in commands:
        assert name == "vlm-vision"
        assert main(arguments) == 0
    assert (tmp_path / "runs" / "check_run" / "report.html").is_file()
    assert (tmp_path / "packed" / "test" / "1.tar").is_file()

    nodes = source_nodes(load_config(DataNode, tmp_path / "run.yaml").data)
    there = tuple(node.model_copy(update={"path": f"{tmp_path}/{node.path}"}) for node in nodes)
    pairs = Pairs(there)
    assert (len(pairs), pairs.epoch_size) == (8 + 8 + 8, 8 + 16 + 4)


def test_the_page_tells_the_defaults() -> None:
    for field in ("lanes", "cache_gb", "max_bad_share"):
        default = PairsConfig.model_fields[field].default
        assert f"`{field}` ({default:g})" in PAGE
    assert all(word in PAGE for word in PairsConfig.model_fields["missing_captions"].default)
