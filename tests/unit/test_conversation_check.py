"""`data check` of conversations, and what training refuses before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny import TOWER, colour_records, tiny_llm, tiny_tokenizer

from vlm_vision.cli import main
from vlm_vision.errors import DataError
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.conversation_check import ConversationFindings, check_conversations, measure
from vlm_vision.train.conversations import ChatFormat, Conversations
from vlm_vision.train.conversations_config import ConversationConfig


def talk(*spoken: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(spoken)]


WORDS = "what colour is the picture of the picture of the picture"
RECORDS: list[dict[str, Any]] = [
    {"id": "one", "image": "0.png", "conversations": talk("<image>\nwhat ?", "red")},
    {"id": "two", "image": ["0.png", "1.png"], "conversations": talk("<image> or <image> ?", "red")},
    {"id": "text", "conversations": talk("what ?", "red", "what ?", "blue")},
    {"id": "long", "conversations": talk("what ?", "red", WORDS, "blue")},
    {"id": "marks", "image": "0.png", "conversations": talk("what ?", "red")},
    {"id": "answer", "image": "0.png", "conversations": talk("what ?", "<image> red")},
    {"id": "outside", "image": "../train.json", "conversations": talk("<image>", "red")},
    {"id": "link", "image": "link.png", "conversations": talk("<image>", "red")},
    {"id": "torn", "image": "torn.png", "conversations": talk("<image>", "red")},
    {"id": "no label", "conversations": talk(WORDS + " " + WORDS, "red")},
    {"id": "cut off", "image": "0.png", "conversations": talk(WORDS, "red", "<image>\nwhat ?", "red")},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    colour_records(tmp_path, 4)
    (tmp_path / "images" / "torn.png").write_bytes(b"torn")
    (tmp_path / "outside.png").write_bytes((tmp_path / "images" / "3.png").read_bytes())
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "talks.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return tmp_path


def look_at(data: Path, workers: int = 0, **options: Any) -> ConversationFindings:
    node = ConversationConfig(file=str(data / "talks.json"), image_folder=str(data / "images"), **options)
    chat = ChatFormat(tiny_tokenizer(), 5)
    return check_conversations(node, chat=chat, max_length=20, workers=workers)


def test_what_is_found_by_hand(data: Path) -> None:
    found = look_at(data, max_bad_share=0.7)
    records = found.measures.records
    assert records["index"].tolist() == [0, 1, 2, 3]
    assert records["pictures"].tolist() == [1, 2, 0, 0]
    # <s> user : .. \n answer : red </s> \n, with 5 tokens for every picture
    assert records["tokens"].tolist() == [
        1 + 2 + 5 + 1 + 2 + 1 + 2 + 2 + 1,
        1 + 2 + 12 + 1 + 2 + 2 + 1,
        21,
        30,
    ]
    assert records["kept"].tolist() == [17, 20, 20, 20]
    assert records["labels"].tolist() == [2, 2, 4, 2]
    assert (found.allowed, found.too_long) == (7, 3)
    told = {"marks": "0 <image> in the text, but 1 picture(s)", "answer": "<image> stands in an answer"}
    told |= {
        "outside": "lies outside the image folder",
        "link": "is a link that leads out",
        "torn": "torn.png",
    }
    told |= {"no label": "no token to learn from", "cut off": "max_length 20 would cut off a picture"}
    for (record, reason), bad in zip(told.items(), found.bad, strict=True):
        assert f"record {record!r}" in bad
        assert reason in bad
    table = found.table
    assert table["bad"] == "7 (allowed: 7)"
    assert [table[name] for name in ("of one picture", "of several pictures", "of text alone")] == [
        "1", "1", "2",
    ]  # fmt: skip
    assert table["pictures of a record"] == "0 to 2, median 0"
    assert table["tokens in all"] == "77"


def test_workers_find_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_vision.train.conversation_check.CHUNK", 3)
    alone, helped = look_at(data), look_at(data, workers=2)
    assert alone.measures.records.tolist() == helped.measures.records.tolist()
    assert alone.bad == helped.bad
    shares = [
        measure(alone.conversations, ChatFormat(tiny_tokenizer(), 5), max_length=20, rank=rank, world=3)
        for rank in range(3)
    ]
    read = np.sort(np.concatenate([share.records["index"] for share in shares])).tolist()
    assert read == [0, 1, 2, 3, 8]  # the torn picture too, for none is opened


def test_the_command_writes_a_page_and_refuses_what_is_bad(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = str(tiny_llm(data / "llm"))
    command = ["data", "check", str(data / "talks.json"), "--image-folder", str(data / "images")]
    command += ["--workers", "0", "-o", str(data / "out")]
    tokens = ["--tokenizer", tokenizer, "--tokens-per-image", "5", "--max-length", "20"]
    assert main([*command, *tokens]) == 2
    told = capsys.readouterr()
    assert "of text alone                              2" in told.out
    assert "records over 20 tokens                     3" in told.out
    assert "7 rows or samples are bad, max_bad_share allows 0" in told.err
    listed = (data / "out" / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 7
    page = (data / "out" / "report.html").read_text(encoding="utf-8")
    assert "Samples of text alone" in page
    assert page.count('src="data:image/jpeg') + page.count('src="data:image/png') == 2
    assert main([*command, *tokens, "--max-bad-share", "0.7"]) == 0
    capsys.readouterr()
    assert main([*command, "--max-bad-share", "0.7"]) == 0  # no tokenizer, no tokens; and so two less are bad
    assert "tokens" not in capsys.readouterr().out
    assert main([*command, "--tokenizer", tokenizer]) == 2
    assert "give both --tokenizer and --tokens-per-image" in capsys.readouterr().err


def config(data: Path, file: str, **options: Any) -> dict[str, Any]:
    node = {"file": str(data / file), "image_folder": str(data / "images"), "workers": 0, **options}
    stage = {"name": "s", "data": node, "learn": [{"match": "projector.*"}], "lr": 1e-3, "steps": 1}
    stage |= {"batch_size": 2, "max_length": 40, "zero_stage": 0}
    model = {"tower": TOWER, "llm": str(tiny_llm(data / "llm"))}
    return {"model": model, "stages": [stage]}


def test_the_command_takes_the_stages_of_a_run(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "run.yaml").write_text(yaml.safe_dump(config(data, "train.json")), encoding="utf-8")
    assert main(["data", "check", str(data / "run.yaml"), "--workers", "0"]) == 0
    told = capsys.readouterr().out
    assert "stage 's'" in told
    assert "records over 40 tokens                     0" in told
    assert "tokens of a record" in told
    assert main(["data", "check", str(data / "run.yaml"), "--max-length", "9"]) == 2
    assert "--max-length:" in capsys.readouterr().err
    assert main(["data", "pack", str(data / "run.yaml"), "-o", str(data / "tars")]) == 2
    assert "data pack writes tars of pictures with captions alone" in capsys.readouterr().err


def test_pictures_lie_beside_their_file_unless_said(tmp_path: Path) -> None:
    colour_records(tmp_path, 4)
    (tmp_path / "train.json").rename(tmp_path / "images" / "train.json")
    assert main(["data", "check", str(tmp_path / "images" / "train.json"), "--workers", "0"]) == 0


def test_captions_are_no_conversations(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "pairs.jsonl").write_text('{"image": "images/0.png", "caption": "red"}\n', encoding="utf-8")
    assert main(["data", "check", str(data / "pairs.jsonl"), "--workers", "0"]) == 0
    assert "captions per picture" in capsys.readouterr().out


def test_bad_records_are_refused_before_weights_are_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "bad.json").write_text(json.dumps([RECORDS[0], RECORDS[9]]), encoding="utf-8")
    monkeypatch.setattr("vlm_vision.train.align.build_model", lambda *given: pytest.fail("weights are read"))
    settings = config(data, "bad.json")
    settings["stages"][0]["max_length"] = 28
    with pytest.raises(DataError, match="1 of 2 records cannot be used"):
        align(AlignConfig.model_validate(settings), tmp_path / "run")


def test_what_was_found_is_kept_by_all_that_it_depends_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLM_VISION_CACHE", str(tmp_path / "cache"))
    looks: list[int] = []

    def counted(conversations: Any, *given: Any, **options: Any) -> Any:
        looks.append(len(conversations))
        return measure(conversations, *given, **options)

    monkeypatch.setattr("vlm_vision.train.conversation_check.measure", counted)
    (data / "talks.json").write_text(json.dumps([*[RECORDS[0]] * 5, RECORDS[9]]), encoding="utf-8")
    settings = config(data, "talks.json", max_bad_share=0.2)
    settings["stages"][0] |= {"max_length": 28, "group_by_length": True}

    def run(name: str) -> list[str]:
        align(AlignConfig.model_validate(settings), tmp_path / name, resume=True)
        listed = (tmp_path / name / "s" / "bad_samples.jsonl").read_text(encoding="utf-8")
        return [json.loads(line)["error"] for line in listed.splitlines()]

    first = run("first")
    assert "record 'no label'" in first[0]
    (tmp_path / "first" / "s" / "done.json").unlink()
    assert run("first") == first  # goes on, from what lies in the run's folder
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.unlink()
    (tmp_path / "first" / "s" / "done.json").unlink()
    assert run("first") == first
    assert run("second") == first  # another run, from the user's cache
    assert len(looks) == 1
    settings["stages"][0]["data"]["max_bad_share"] = 0.0
    with pytest.raises(DataError, match="1 of 6 records"):  # what is kept is judged anew
        run("third")
    assert len(looks) == 1
    settings["stages"][0]["data"]["max_bad_share"] = 0.2
    settings["stages"][0]["max_length"] = 27
    run("shorter")
    (data / "talks.json").write_text(json.dumps([*[RECORDS[2]] * 5, RECORDS[9]]), encoding="utf-8")
    run("other records")
    (data / "template.jinja").write_text(tiny_tokenizer().chat_template + "{# other #}", encoding="utf-8")
    settings["model"]["chat_template"] = str(data / "template.jinja")
    run("other template")
    assert len(looks) == 4


def test_without_the_check_bad_records_are_found_as_they_come(data: Path, tmp_path: Path) -> None:
    (data / "bad.json").write_text(json.dumps([*[RECORDS[0]] * 3, RECORDS[9]]), encoding="utf-8")
    settings = config(data, "bad.json", max_bad_share=0.25)
    settings["stages"][0] |= {"steps": 2, "max_length": 28}
    checked = align(AlignConfig.model_validate(settings), tmp_path / "checked")["s"]
    settings["stages"][0]["data"]["check"] = False
    found = align(AlignConfig.model_validate(settings), tmp_path / "found")["s"]
    assert (
        (found["loss"], found["replaced"]) == (checked["loss"], checked["replaced"]) == (checked["loss"], 1)
    )
    assert not list((tmp_path / "found" / "s").glob("measured-*"))
    lists = [(tmp_path / name / "s" / "bad_samples.jsonl").read_text() for name in ("checked", "found")]
    assert lists[0] == lists[1]
    settings["stages"][0]["data"]["max_bad_share"] = 0.0
    with pytest.raises(DataError, match=r"(?s)'no label'.*max_bad_share"):
        align(AlignConfig.model_validate(settings), tmp_path / "none")
    settings["stages"][0]["group_by_length"] = True
    with pytest.raises(ValueError, match="group_by_length takes the lengths that the check finds"):
        AlignConfig.model_validate(settings)


def test_tables_are_told_apart_by_their_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    digests = list[str]()
    for number, words in enumerate(("red", "blue", "red")):
        rows = [{"conversations": talk("what ?", words)}] * 3
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{number}.parquet")
        digests.append(Conversations(tmp_path / f"{number}.parquet")._file.digest())
    assert digests[0] == digests[2] != digests[1]


def test_training_refuses_before_its_first_step(data: Path, tmp_path: Path) -> None:
    for number, record in enumerate(RECORDS):
        if record["id"] in ("no label", "link"):
            (data / f"{number}.json").write_text(json.dumps([*[RECORDS[0]] * 5, record]), encoding="utf-8")
            settings = config(data, f"{number}.json", follow_links=False)
            settings["stages"][0]["max_length"] = 28
            with pytest.raises(DataError, match=rf"1 of 6 records cannot be used(?s:.*){record['id']!r}"):
                align(AlignConfig.model_validate(settings), tmp_path / "run")
            settings["stages"][0]["data"]["max_bad_share"] = 0.2
            figures = align(AlignConfig.model_validate(settings), tmp_path / f"run{number}")
            assert figures["s"]["steps"] == 1
            listed = (tmp_path / f"run{number}" / "s" / "bad_samples.jsonl").read_text(encoding="utf-8")
            assert f"record {record['id']!r}" in listed
