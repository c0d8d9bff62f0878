from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TOWER, tiny_llm, tiny_tokenizer, tiny_tower

from vlm_vision import VisionTower, load_dual_encoder
from vlm_vision.adapters import build_projector
from vlm_vision.cli import main
from vlm_vision.train.vlm import VisionLanguageModel, load_llm

COMMANDS = (
    "demo",
    "towers",
    "projectors",
    "features",
    "export",
    "contrastive",
    "align",
    "chat",
    "zero-shot",
    "index",
    "search",
    "score",
    "merge",
    "drift",
    "plan",
)
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip`, `tower` and `vlm`, saved."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    load_dual_encoder(TOWER).save_pretrained(folder / "clip")
    tower = tiny_tower()
    tower.save_pretrained(folder / "tower")
    llm = load_llm(tiny_llm(folder / "llm"))
    projector = build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid)
    VisionLanguageModel(tower, projector, llm, tiny_tokenizer()).save_pretrained(folder / "vlm")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        noise = random.integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command prints; it must work."""
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert status == 0, output.err
    return output.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error of a command, which must fit on a screen and carry no traceback."""
    status = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    told = error[error.index("error: ") :]
    assert status == 2
    assert "Traceback" not in error
    assert len(told.splitlines()) <= 41
    return told


# The frame ----------------------------------------------------------------------------------------------


def test_help_names_every_command_and_reads_no_library() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlm_vision.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in COMMANDS:
        assert f"    {command}" in result.stdout
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "transformers"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"examples:\n  vlm-vision {command}" in capsys.readouterr().out


def test_the_installed_command_ends_with_its_status() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "vlm-vision"), "towrs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown command 'towrs'; did you mean 'towers'?")
    assert result.stdout == ""


def test_debug_shows_where_an_error_came_from() -> None:
    with pytest.raises(Exception, match="does not exist"):
        main(["plan", "absent.yaml", "--debug"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["alig", "x.yaml"], "unknown command 'alig'; did you mean 'align'?"),
        (["align", "x.yaml", "--resumee"], "align takes no '--resumee'; did you mean '--resume'?"),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["demo", "extra"], "demo takes no 'extra'"),
        (["features", "a:b", "-o", "f", "--layer", "x"], "must be a number, or numbers with commas between"),
        (["features", "a:b", "-o", "f", "--batch-size", "0"], "must be a whole number above 0"),
        (["features", "a:b", "photo.jpg"], "required: -o/--output"),
        (["towers", "open_clip:ViT-B-32"], "towers show open_clip:ViT-L-14-336-quickgelu"),
        (["towers", "--source", "tim"], "unknown source 'tim'; did you mean 'timm'?"),
    ],
)
def test_wrong_arguments_say_what_is_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


# Towers and features ------------------------------------------------------------------------------------


def test_towers_lists_and_filters(capsys: pytest.CaptureFixture[str]) -> None:
    _, *rows = run(capsys, "towers", "--source", "open_clip", "--match", "ViT-L-14-336*").splitlines()
    assert [row.split()[0] for row in rows] == ["open_clip:ViT-L-14-336", "open_clip:ViT-L-14-336-quickgelu"]
    assert "transformers:openai/clip-vit-base-patch16" in run(capsys, "towers", "--source", "transformers")


def test_towers_show_tells_facts_without_weights(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "towers", "show", "transformers:openai/clip-vit-large-patch14-336")
    assert "1024" in printed
    assert "576 (24 x 24, every 14 pixels)" in printed
    assert "290,909,184" in printed
    assert "16 (4 x 4, every 8 pixels)" in run(capsys, "towers", "show", models / "tower")
    assert "did you mean 'ViT-L-14'" in refused(capsys, "towers", "show", "open_clip:ViTL-14")


@torch.no_grad()
def test_towers_verify_compares_with_their_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["open_clip:ViT-S-32-alt", "timm:test_vit"]
    lines = run(capsys, "towers", "verify", *names).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == names
    assert all(float(error) <= 1e-5 for line in lines[1:3] for error in line.split()[1:3])  # measured 5e-7
    assert lines[3:] == ["2 verified: 2 equal"]
    assert "has no other library to compare with" in refused(capsys, "towers", "verify", names[0], "fused:x")


def test_features_are_the_towers(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "features.safetensors"
    printed = run(
        capsys,
        "features",
        models / "tower",
        "-o",
        output,
        "--layer=-2,1",
        pictures,
        pictures / "0.png",
        "--batch-size",
        3,
    )
    assert f"{output}: features [5, 16, 128] float32" in printed
    tower = VisionTower.from_pretrained(models / "tower", layer=[-2, 1])
    files = [*sorted(pictures.iterdir()), pictures / "0.png"]
    saved = load_file(output)["features"]
    assert torch.allclose(saved, tower(tower.image_processor(files)), atol=1e-6)
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["pictures"]) == [str(path) for path in files]
    run(
        capsys,
        "features",
        models / "tower",
        pictures / "0.png",
        "-o",
        output,
        "--select",
        "cls",
        "--dtype",
        "bfloat16",
        "--layer",
        -2,
    )
    assert (load_file(output)["features"].dtype, load_file(output)["features"].shape) == (
        torch.bfloat16,
        (1, 1, 64),
    )


def test_features_of_what_is_not_there_are_refused(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "features.safetensors"
    tower = models / "tower"
    (pictures / "broken.jpg").write_bytes(b"<html>")
    assert "broken.jpg: is not a picture" in refused(capsys, "features", tower, pictures, "-o", output)
    assert "'absent.jpg' does not exist" in refused(capsys, "features", tower, "absent.jpg", "-o", output)
    assert "no picture was given" in refused(capsys, "features", tower, "-o", output)
    assert "layer -1 is not in it" in refused(
        capsys, "features", tower, pictures / "0.png", "-o", output, "--layer=-1"
    )
    assert "layer 9 is out of range" in refused(
        capsys, "features", tower, pictures / "0.png", "-o", output, "--layer=9"
    )
    assert "use open_clip:ViT-B-32-quickgelu@openai" in refused(
        capsys, "features", "open_clip:ViT-B-32@openai", pictures / "0.png", "-o", output
    )
    assert not output.exists()


def test_weights_of_another_model_are_refused(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "tower", tmp_path / "tower")
    shutil.copy(models / "clip" / "model.safetensors", tmp_path / "tower" / "model.safetensors")
    config = json.loads((tmp_path / "tower" / "config.json").read_text(encoding="utf-8"))
    config["tower"]["backbone"]["architecture"]["vision_cfg"]["width"] = 32
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    told = refused(capsys, "features", tmp_path / "tower", pictures / "0.png", "-o", tmp_path / "f")
    assert "these weights are not for this model" in told
    assert "of another shape" in told


# Zero-shot and search -----------------------------------------------------------------------------------


def test_zero_shot_classifies_pictures(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(
        capsys, "zero-shot", models / "clip", "--classes", "a cat, a dog,a car", pictures / "0.png", pictures
    )
    lines = printed.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"{pictures / '0.png'}: a ")
    assert lines[0].count(",") == 2
    (tmp_path / "classes.txt").write_text("a cat\n\na dog\na car\n", encoding="utf-8")
    again = run(
        capsys,
        "zero-shot",
        models / "clip",
        pictures / "0.png",
        pictures,
        "--classes",
        tmp_path / "classes.txt",
    )
    assert again == printed
    assert ":" in run(
        capsys, "zero-shot", models / "clip", pictures, "--classes", "cat,dog", "--template", "a {}", "-k", 1
    )


def test_zero_shot_takes_named_lists(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("zero-shot", models / "clip", pictures, "--classes", "imagenet", "-k", 1)
    plain = run(capsys, *arguments)
    assert len(plain.splitlines()) == 4
    assert run(capsys, *arguments, "--template", "openai_7") != plain


def labelled(pictures: Path, *labels: str, header: str = "image,label") -> Path:
    rows = [f"{number}.png,{label}" for number, label in enumerate(labels)]
    path = pictures / "labelled.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_zero_shot_scores_labelled_pictures(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(
        capsys, "zero-shot", models / "clip", pictures, "--classes", "cat,dog,car", "-k", 1
    ).splitlines()
    best = [row.rpartition(": ")[2].split()[0] for row in rows]
    wrong = "dog" if best[0] != "dog" else "cat"
    table = labelled(pictures, wrong, *best[1:])
    printed = run(capsys, "zero-shot", models / "clip", "--csv", table, "--classes", "cat,dog,car")
    assert printed == "top-1 0.7500 (3 of 4, 3 classes)\n"


def test_zero_shot_refuses_what_makes_no_sense(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = models / "clip"
    assert "zero-shot needs classes" in refused(capsys, "zero-shot", clip, pictures)
    assert "no picture was given" in refused(capsys, "zero-shot", clip, "--classes", "cat")
    assert "'absent.png' does not exist" in refused(
        capsys, "zero-shot", clip, "absent.png", "--classes", "cat"
    )
    assert "row 2: label is empty" in refused(
        capsys, "zero-shot", clip, "--csv", labelled(pictures, "cat", " ")
    )
    assert "no column 'label'; did you mean 'labels'?" in refused(
        capsys, "zero-shot", clip, "--csv", labelled(pictures, "cat", header="image,labels")
    )
    assert "label 'catt' is no class; did you mean 'cat'?" in refused(
        capsys, "zero-shot", clip, "--csv", labelled(pictures, "catt"), "--classes", "cat,dog"
    )
    assert "each hold one {}" in refused(
        capsys, "zero-shot", clip, pictures, "--classes", "cat", "--template", "photo"
    )
    assert "model_type is 'vlm_vision_tower'" in refused(
        capsys, "zero-shot", models / "tower", pictures, "--classes", "cat"
    )


# Scores and drift ---------------------------------------------------------------------------------------


def test_score_prints_and_writes(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = labelled(pictures, "cat", "dog", "cat", "dog")
    printed = run(
        capsys,
        *("score", models / "clip", "--zero-shot", table, "--retrieval", table),
        *("--probe", table, table, "--probe-features", "both", "--templates", "openai_7"),
        *("--caption-column", "label", "-o", tmp_path / "new" / "scores.json"),
    )
    written = json.loads((tmp_path / "new" / "scores.json").read_text(encoding="utf-8"))
    assert {row.split()[0]: float(row.split()[1]) for row in printed.splitlines()} == pytest.approx(
        written["scores"], abs=5e-5
    )
    assert {"zero_shot_top1", "text_to_image_r10", "linear_probe_patches_top1"} <= written["scores"].keys()
    assert written["zero_shot"]["classes"] == ["cat", "dog"]
    assert sum(map(sum, written["zero_shot"]["confusion"])) == 4
    assert written["validation"]["zero_shot"]["templates"] == "openai_7"


def test_score_refuses_what_makes_no_sense(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = ("score", models / "clip")
    table = labelled(pictures, "cat", "dog")
    assert "score needs data: --zero-shot" in refused(capsys, *score)
    assert "'absent.csv' does not exist" in refused(capsys, *score, "--retrieval", "absent.csv")
    assert "no column 'caption'" in refused(capsys, *score, "--zero-shot", table)
    labels = ("--zero-shot", table, "--caption-column", "label")
    assert "did you mean 'openai_80'" in refused(capsys, *score, *labels, "--templates", "openai_8")
    (tmp_path / "c.txt").write_text("cat\nbird\n", encoding="utf-8")
    assert "label 'dog' is no class" in refused(capsys, *score, *labels, "--classes", tmp_path / "c.txt")
    assert "each with two pictures" in refused(
        capsys, *score, "--probe", table, table, "--caption-column", "label"
    )


def test_drift_tells_every_layer(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "drift.json"
    command = ("drift", models / "clip", models / "tower", pictures, "--count", 3, "-o", output)
    rows = run(capsys, *command, "--projector", models / "vlm").splitlines()
    assert rows[0] == "3 pictures; a VLM reads layer 2"
    assert [row.split()[0] for row in rows[2:]] == ["1", "2", "projected"]
    written = json.loads(output.read_text(encoding="utf-8"))
    assert [layer["layer"] for layer in written["layers"]] == [1, 2]
    assert written["projected"]["cosine"] == pytest.approx(float(rows[-1].split()[1]), abs=5e-5)
    (pictures / "broken.jpg").write_bytes(b"<html>")
    assert "broken.jpg: is not a picture" in refused(capsys, *command[:4])


def test_index_and_search(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, index = models / "clip", tmp_path / "index"
    printed = run(capsys, "index", clip, pictures, "-o", index, "--faiss", tmp_path / "index.faiss")
    assert f"{index}: 4 pictures, 0 left out" in printed
    assert (tmp_path / "index.faiss").is_file()
    found = run(capsys, "search", index, clip, "--image", pictures / "2.png", "-k", 2).splitlines()
    assert len(found) == 2
    assert found[0] == f"1.0000  {pictures / '2.png'}"
    assert len(run(capsys, "search", index, clip, "a red circle").splitlines()) == 4
    assert "takes one query" in refused(capsys, "search", index, clip)
    assert "takes one query" in refused(capsys, "search", index, clip, "text", "--image", pictures / "2.png")
    assert "the query is empty" in refused(capsys, "search", index, clip, "")
    assert "is no visual index" in refused(capsys, "search", tmp_path, clip, "text")


def test_index_lists_what_it_leaves_out(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.jpg").write_bytes(b"<html>")
    arguments = ("index", models / "clip", pictures, "-o", tmp_path / "index")
    assert "1 of 5 pictures cannot be read" in refused(capsys, *arguments)
    printed = run(capsys, *arguments, "--max-bad-share", 0.5)
    assert f"left out: {pictures / 'broken.jpg'}: is not a picture" in printed
    assert "4 pictures, 1 left out" in printed


# Chat ---------------------------------------------------------------------------------------------------


def test_chat_answers_one_question_or_many(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("chat", models / "vlm", "--image", pictures / "0.png", "--max-new-tokens", 3)
    answer = run(capsys, *asked, "--question", "what colour is it ?")
    typed = iter(["what colour is it ?", "what is the picture ?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    lines = run(capsys, *asked).splitlines()
    assert lines[1] == answer.removesuffix("\n")
    assert len(lines) == 3


def test_chat_prints_words_as_they_come_and_remembers_them(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[str] = []
    asked: list[list[str]] = []

    def stream(self: Any, pixels: Any, turns: Any, max_new_tokens: int, image_sizes: Any) -> Iterator[str]:
        asked.append([turn.text for turn in turns])
        yield "a red"
        printed.append(capsys.readouterr().out)
        yield " picture"

    monkeypatch.setattr(VisionLanguageModel, "stream", stream)
    typed = iter(["what ?", "and ?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    rest = run(capsys, "chat", models / "vlm", "--image", pictures / "0.png")
    assert printed[0].endswith("\na red")
    assert printed[1] == " picture\na red"
    assert rest == " picture\n"
    assert asked == [["<image>\nwhat ?"], ["<image>\nwhat ?", "a red picture", "and ?"]]


def test_chat_needs_a_picture_a_question_and_a_model(
    models: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "chat needs a picture" in refused(capsys, "chat", models / "vlm")
    picture = pictures / "0.png"
    assert "the question is empty" in refused(
        capsys, "chat", models / "vlm", "--image", picture, "--question", " "
    )
    assert "is a part of a character" in refused(
        capsys, "chat", models / "vlm", "--image", picture, "--question", "w\udce4s ?"
    )
    assert "'absent.png' does not exist" in refused(capsys, "chat", models / "vlm", "--image", "absent.png")
    assert "expected 'vlm_vision_language_model'" in refused(
        capsys, "chat", models / "clip", "--image", picture, "--question", "what ?"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vlm_vision[app]'" in refused(capsys, "chat", models / "vlm", "--web")


def test_a_model_folder_that_is_not_whole_is_named(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(folder: Path) -> str:
        return refused(capsys, "chat", folder, "--image", pictures / "0.png", "--question", "what ?")

    shutil.copytree(models / "vlm", tmp_path / "run" / "model")
    assert f"{tmp_path / 'run' / 'model'} is one" in ask(tmp_path / "run")
    os.truncate(tmp_path / "run" / "model" / "llm" / "model.safetensors", 1000)
    assert "model/llm' cannot be loaded" in ask(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "model" / "llm")
    assert "there is no such folder" in ask(tmp_path / "run" / "model")


def test_an_output_that_cannot_be_written_is_named_before_anything_is_done(
    models: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a file").touch()
    questions = tmp_path / "q.json"
    questions.write_text('[{"image": "0.png", "question": "what ?", "answer": "x"}]', encoding="utf-8")
    for command in (
        ("eval", "gone", "--questions", questions, "--images", pictures),
        ("data", "check", "gone.csv"),
        ("export", models / "vlm", "--to", "transformers"),
    ):
        error = refused(capsys, *command, "-o", tmp_path / "a file" / "out")
        assert "a file/out' cannot be written (" in error
        assert "give another place" in error


@pytest.mark.parametrize("content", ["", "[]", " \n"])
def test_data_check_of_no_record(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.json").write_text(content, encoding="utf-8")
    assert "none.json holds no record" in refused(capsys, "data", "check", tmp_path / "none.json")


# Training and planning ----------------------------------------------------------------------------------


def test_contrastive_trains_a_model_that_classifies(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "pairs.csv").write_text(
        "image,caption\n" + "".join(f"{number}.png,picture {number}\n" for number in range(4)),
        encoding="utf-8",
    )
    config = tmp_path / "adapt.yaml"
    content = {
        "model": TOWER,
        "data": {"path": "absent.csv"},
        "recipe": "scratch",
        "steps": 2,
        "batch_size": 4,
    }
    config.write_text(json.dumps({**content, "workers": 0}), encoding="utf-8")
    output = tmp_path / "run"
    printed = run(
        capsys, "contrastive", config, "-o", output, f"data.path={pictures / 'pairs.csv'}", "seed=3"
    )
    assert f"model: {output / 'model'}" in printed
    assert "loss" in printed
    assert ":" in run(capsys, "zero-shot", output / "model", "--classes", "cat,dog", pictures / "0.png")
    assert "absent.csv' does not exist" in refused(capsys, "contrastive", config, "-o", tmp_path / "other")
    told = refused(capsys, "contrastive", config, "batchsize=3", "data.pth=x", "-o", tmp_path / "other")
    assert "batchsize: unknown key; did you mean 'batch_size'?" in told
    (pictures / "silent.csv").write_text("image,caption\n0.png,\n1.png, \n", encoding="utf-8")
    silent = f"data.path={pictures / 'silent.csv'}"
    assert "no row has a caption" in refused(capsys, "contrastive", config, silent, "-o", tmp_path / "other")
    assert "data.pth: unknown key; did you mean 'path'?" in told


def test_align_refuses_a_wrong_config(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "align.yaml"
    stage = {
        "name": "one",
        "data": {"file": str(tmp_path / "absent.json")},
        "learn": [{"match": "projector.*"}],
        "lr": 1e-3,
        "steps": 1,
        "batch_size": 1,
        "max_length": 64,
    }
    content = {"model": {"tower": str(models / "tower"), "llm": str(models / "llm")}, "stages": [stage]}
    config.write_text(json.dumps(content), encoding="utf-8")
    told = refused(
        capsys, "align", config, "stages.0.learning_rate=1", "model.projector=mlp", "-o", tmp_path / "run"
    )
    assert "stages.0.learning_rate: unknown key" in told
    assert "absent.json' does not exist" in refused(capsys, "align", config, "-o", tmp_path / "run")
    assert "config file 'absent.yaml' does not exist" in refused(capsys, "align", "absent.yaml")
    turns = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "red"}]
    record = {"id": "r7", "image": "0.png", "conversations": turns}
    (tmp_path / "absent.json").write_text(json.dumps([record]), encoding="utf-8")
    told = refused(capsys, "align", config, "-o", tmp_path / "run", f"stages.0.data.image_folder={tmp_path}")
    assert "record 'r7': 2 <image> in the text, but 1 picture(s)" in told


def test_a_long_error_is_cut_to_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "long.yaml"
    config.write_text("".join(f"key{number}: 1\n" for number in range(100)), encoding="utf-8")
    assert "more lines (all of them: --debug)" in refused(capsys, "contrastive", config)


@pytest.mark.parametrize(("stage", "steps"), [("stage1", "2,180"), ("stage2", "5,197")])
def test_plan_of_the_llava_configs(stage: str, steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = {"stage1": 558_128, "stage2": 665_298}[stage]
    path = CONFIGS / f"llava15_7b_{stage}.yaml"
    printed = run(capsys, "plan", path, "--processes", 8, "--records", records)
    assert "tokens per image: 576" in printed
    assert f"steps: {steps} (1 epoch(s) of {records:,} // " in printed
    assert "6,738,415,616" in printed
    assert "20,979,712      20,979,712" in printed
    assert "memory on each of 8 process(es)" in printed
    assert "give --records N" in run(capsys, "plan", path)


def test_plan_of_the_vit_l14_adaptation(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "plan", CONFIGS / "vit_l14_336_lora.yaml", "--records", 50_000)
    assert "tokens per image: 577" in printed
    assert "steps: 975 (5 epoch(s) of 50,000 // 256)" in printed
    # 24 layers of width 1024, rank 16: q, k, v, out (2 x 1024 each), c_fc and c_proj (1024 + 4096 each)
    adapters = 24 * 16 * (4 * 2 * 1024 + 2 * (1024 + 4096))
    assert f"{adapters:,}" in printed


def test_plan_counts_data_that_is_there(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "pairs.csv").write_text(
        "image,caption\n" + "".join(f"{number}.png,picture {number}\n" for number in range(4)),
        encoding="utf-8",
    )
    config = tmp_path / "adapt.yaml"
    content = {"model": TOWER, "data": {"path": str(pictures / "pairs.csv")}, "epochs": 3, "batch_size": 2}
    config.write_text(json.dumps(content), encoding="utf-8")
    printed = run(capsys, "plan", config)
    assert "recipe 'frozen_vision' (4 pairs are under 10,000)" in printed
    assert "steps: 6 (3 epoch(s) of 4 // 2)" in printed
    assert "nothing to count" in refused(capsys, "plan", config, "data.path=absent.csv")
    assert "recipe 'lora'" in run(capsys, "plan", config, "data.path=absent.csv", "--records", 20_000)
    assert "recipe: input should be" in refused(capsys, "plan", config, "recipe=loar")
    assert "--tokens is for stages of alignment" in refused(capsys, "plan", config, "--tokens", 9)


def test_demo_refuses_a_folder_with_an_earlier_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    assert "holds an earlier demo" in refused(capsys, "demo", "-o", tmp_path)
    assert "missing; the demo reads" in refused(capsys, "demo", "-o", tmp_path / "new", "--data", tmp_path)
