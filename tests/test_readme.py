"""The README's snippets run as they stand, in a folder with only what their text mentions."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"<!-- test: (?P<name>\S+) -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = {match["name"]: match["code"] for match in BLOCK.finditer(README.read_text(encoding="utf-8"))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = []
    for number in range(8):
        name = f"picture{number}.png"
        Image.effect_noise((40, 30), 60 + number).convert("RGB").save(tmp_path / name)
        rows.append((name, f"noise of kind {number}"))
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.jpg")
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return tmp_path


@pytest.mark.parametrize("name", ["import", "swap"])
def test_python_snippets(name: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", BLOCKS[name]], cwd=folder, check=True, timeout=900)


def test_adapt_snippet(folder: Path) -> None:
    (folder / "adapt.yaml").write_text(BLOCKS["adapt.yaml"], encoding="utf-8")
    command = str(Path(sys.executable).parent / "vlm-vision")
    for line in BLOCKS["adapt"].strip().splitlines():
        assert line.startswith("vlm-vision ")
        done = subprocess.run(
            line.replace("vlm-vision", command, 1),
            cwd=folder,
            shell=True,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
    assert "circle" in done.stdout
    assert (folder / "runs/adapted/model/config.json").is_file()


def test_every_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"vlm-vision\s+([a-z][a-z-]+)", README.read_text(encoding="utf-8")))
    listed = subprocess.run(
        [sys.executable, "-m", "vlm_vision.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert named
    assert all(command in listed for command in named)
