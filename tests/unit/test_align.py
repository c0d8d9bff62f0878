from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOWER, colour_records, tiny_llm, tiny_tower

from vlm_vision.config import load_config, read_yaml
from vlm_vision.errors import ConfigError, DataError, VlmVisionError
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig, ConversationConfig, Stage
from vlm_vision.train.chat_format import read_template
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.deepspeed_engine import engine_settings
from vlm_vision.train.evaluate import answer_questions, vqa_accuracy
from vlm_vision.train.plan import plan_align
from vlm_vision.train.rules import Rule
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import VisionLanguageModel

pytest.importorskip("deepspeed")
CONFIGS = Path(__file__).parents[2] / "configs"
PROJECTOR, EVERYTHING_BUT_TOWER = [{"match": "projector.*"}], [{"match": "projector.*"}, {"match": "llm.*"}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_llm(folder / "llm")
    colour_records(folder, 16, text_only=2)
    tiny_tower().save_pretrained(folder / "tower")
    return folder


def config(data: Path, *stages: dict[str, Any], **model: Any) -> AlignConfig:
    defaults = {
        "data": {"file": str(data / "train.json"), "image_folder": str(data / "images"), "workers": 0},
        "lr": 1e-2,
        "steps": 8,
        "batch_size": 8,
        "max_length": 64,
        "log_every": 1,
    }
    named = [{"name": f"stage{number}", **defaults, **stage} for number, stage in enumerate(stages, start=1)]
    parts = {"tower": str(data / "tower"), "llm": str(data / "llm"), "projector": "mlp2x_gelu", **model}
    return load_config(AlignConfig, {"model": parts, "stages": named})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def tensors(model: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(model / part / "model.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_two_stages_learn_what_they_say_and_nothing_else(data: Path, tmp_path: Path) -> None:
    stages = {"learn": PROJECTOR}, {"learn": EVERYTHING_BUT_TOWER, "steps": 40}
    figures = align(config(data, *stages), tmp_path / "run")
    assert list(figures) == ["stage1", "stage2"]
    for name in figures:
        curve = losses(tmp_path / "run" / name)
        assert curve[-1] < curve[0]
        assert figures[name]["loss"] == curve[-1]
    assert figures["stage2"]["loss"] < 0.3

    first, model = tmp_path / "run" / "stage1" / "model", tmp_path / "run" / "model"
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "projector"]
    assert same(tensors(model, "tower"), load_file(data / "tower" / "model.safetensors"))
    before, after = load_file(data / "llm" / "model.safetensors"), tensors(model, "llm")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not same(tensors(first, "projector"), tensors(model, "projector"))

    answers = answer_questions(
        VisionLanguageModel.from_pretrained(model), Conversations(data / "train.json", data / "images")
    )
    assert vqa_accuracy(answers)["all"] >= 0.9


def test_stage_one_leaves_the_language_model_bit_for_bit(data: Path, tmp_path: Path) -> None:
    align(config(data, {"learn": PROJECTOR}), tmp_path)
    assert same(tensors(tmp_path / "model", "llm"), load_file(data / "llm" / "model.safetensors"))
    assert same(tensors(tmp_path / "model", "tower"), load_file(data / "tower" / "model.safetensors"))


@pytest.mark.parametrize("zero_stage", [0, 1])  # 2 and 3 are tested on ranks
def test_four_steps_and_four_more_are_eight(data: Path, tmp_path: Path, zero_stage: int) -> None:
    qformer = {
        "name": "qformer",
        "layers": 2,
        "heads": 2,
        "hidden_size": 32,
        "num_queries": 4,
        "dropout": 0.1,
    }
    stage = {"learn": EVERYTHING_BUT_TOWER, "save_every": 4, "zero_stage": zero_stage}
    settings = config(data, stage, projector=qformer)
    align(settings, tmp_path)
    run, model = tmp_path / "stage1", tmp_path / "model"
    through, weights = losses(run), tensors(model, "llm")
    (run / "done.json").unlink()  # as if killed some time after step 4
    align(settings, tmp_path, resume=True)
    # Measured equal; the room is for memory alignment, by which sums on a CPU may differ in the last bit.
    assert losses(run) == pytest.approx(through, abs=1e-6)
    assert len(through) == 8
    for name, tensor in tensors(model, "llm").items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=0)


def test_checkpoints_leave_frozen_weights_out_and_hold_no_code(data: Path, tmp_path: Path) -> None:
    align(config(data, {"learn": PROJECTOR, "save_every": 4}), tmp_path)
    folder = tmp_path / "stage1" / "checkpoints" / "step_4"
    state = torch.load(folder / "rank_0.pt", weights_only=True)
    assert {name.split(".")[0] for name in state["pieces"]} == {"projector"}
    held = sum(flat[key].numel() for flat in state["flats"] for key in ("fp32", "exp_avg", "exp_avg_sq"))
    learning = sum(
        math.prod(shape) for shape in json.loads((folder / "state.json").read_text())["learning"].values()
    )
    assert held == pytest.approx(3 * learning, rel=0.01)  # with what fills up


def test_a_run_goes_on_with_its_own_config_and_data_alone(data: Path, tmp_path: Path) -> None:
    file = shutil.copy(data / "train.json", tmp_path / "train.json")
    records = {"file": str(file), "image_folder": str(data / "images"), "workers": 0}
    stage = {"learn": PROJECTOR, "data": records, "save_every": 4}
    run = tmp_path / "run"
    align(config(data, stage), run)
    assert load_config(AlignConfig, run / "config.yaml") == config(data, stage)
    changed = {"lr": 2e-2, "steps": 9, "data": {**records, "separate": True}}
    for finished in (True, False):
        if not finished:
            (run / "stage1" / "done.json").unlink()
        with pytest.raises(DataError) as refused:
            align(config(data, {**stage, **changed}, llm_weights="none"), run, resume=True)
        for words in (
            "model.llm_weights: 'pretrained' then, 'none' now",
            "stage1.lr: 0.01 then, 0.02 now",
            "stage1.steps: 8 then, 9 now",
            "stage1.data.separate: False then, True now",
            "another output folder",
        ):
            assert words in str(refused.value)
    how = {"micro_batch_size": 4, "zero_stage": 0, "log_every": 2, "data": {**records, "workers": 1}}
    align(config(data, {**stage, **how}), run, resume=True)
    (run / "stage1" / "done.json").unlink()
    file.write_text(json.dumps(json.loads(file.read_text())[:12]), encoding="utf-8")
    with pytest.raises(DataError, match="began with other data"):
        align(config(data, stage), run, resume=True)


def test_a_mix_goes_on_too(data: Path, tmp_path: Path) -> None:
    node = {"file": str(data / "train.json"), "image_folder": str(data / "images")}
    mix = [{**node, "workers": 0, "too_long": "refuse"}, {**node, "weight": 0.5}]
    settings = config(data, {"learn": PROJECTOR, "steps": 1, "data": mix})
    align(settings, tmp_path)
    assert load_config(AlignConfig, tmp_path / "config.yaml") == settings
    align(settings, tmp_path, resume=True)


def test_stages_cannot_be_added_behind_a_finished_run(data: Path, tmp_path: Path) -> None:
    align(config(data, {"learn": PROJECTOR, "steps": 1}), tmp_path)
    with pytest.raises(DataError, match="stages cannot be added behind a finished run"):
        align(config(data, {"learn": PROJECTOR, "steps": 1}, {"learn": PROJECTOR}), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"learn": [{"match": "projektor.*"}]}, "'stage2': rule 'projektor"),
        ({"learn": PROJECTOR, "chat_template": "v2"}, "chat_template 'v2' is no file"),
        ({"learn": PROJECTOR, "data": {"file": "gone.json"}}, "'gone.json' does not exist"),
    ],
)
def test_what_is_wrong_with_a_later_stage_shows_before_the_first(
    data: Path, tmp_path: Path, wrong: dict[str, Any], why: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=why):
        align(config(data, {"learn": PROJECTOR}, wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_json_at_odds_with_a_later_stage_shows_before_the_first(data: Path, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text('{"train_batch_size": 6}', encoding="utf-8")
    later = {"learn": PROJECTOR, "deepspeed": str(tmp_path / "own.json")}
    with pytest.raises(ConfigError, match="train_batch_size"):
        align(config(data, {"learn": PROJECTOR}, later), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_finished_stages_are_not_repeated(data: Path, tmp_path: Path) -> None:
    settings = config(data, {"learn": PROJECTOR}, {"learn": EVERYTHING_BUT_TOWER})
    figures = align(settings, tmp_path)
    with pytest.raises(DataError, match="stage1 holds a finished stage: use --resume"):
        align(settings, tmp_path)
    stamp = (tmp_path / "stage1" / "metrics.jsonl").stat().st_mtime_ns
    (tmp_path / "stage2" / "done.json").unlink()
    again = align(settings, tmp_path, resume=True)
    assert again["stage1"] == figures["stage1"]
    assert again["stage2"]["loss"] == pytest.approx(figures["stage2"]["loss"], abs=1e-6)
    assert (tmp_path / "stage1" / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_micro_batches_change_nothing(data: Path, tmp_path: Path) -> None:
    for size in (8, 2):
        align(config(data, {"learn": EVERYTHING_BUT_TOWER, "micro_batch_size": size}), tmp_path / str(size))
    whole, pieces = (losses(tmp_path / str(size) / "stage1") for size in (8, 2))
    assert pieces == pytest.approx(whole, abs=1e-5)  # worst difference measured: 2.4e-7


def test_checkpointed_activations_change_nothing(data: Path, tmp_path: Path) -> None:
    for on in (False, True):
        stage = {"learn": EVERYTHING_BUT_TOWER, "activation_checkpointing": on}
        align(config(data, stage), tmp_path / str(on))
    assert losses(tmp_path / "True" / "stage1") == pytest.approx(
        losses(tmp_path / "False" / "stage1"), abs=1e-6
    )


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_labels_in_chunks_change_nothing(
    zero_stage: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"learn": EVERYTHING_BUT_TOWER, "zero_stage": zero_stage}
    align(config(data, stage), tmp_path / "whole")
    monkeypatch.setattr("vlm_vision.train.label_loss.CHUNK", 3)
    align(config(data, stage), tmp_path / "chunks")
    found = losses(tmp_path / "chunks" / "stage1")
    # Worst difference measured: 2.4e-7.
    assert len(found) == 8
    assert found == pytest.approx(losses(tmp_path / "whole" / "stage1"), abs=1e-5)


@pytest.mark.parametrize("learning", [7, 8, 10**9 + 1])
def test_buckets_hold_what_learns_and_are_even(learning: int) -> None:
    """DeepSpeed's bf16 optimizer asserts it, and an odd vocabulary makes an odd number of parameters."""
    stage = Stage(
        name="s", data=ConversationConfig(file="f"), learn=(Rule(match="*"),), lr=1, steps=1, batch_size=1
    )
    zero = engine_settings(stage, 1, 1, 8, learning)["zero_optimization"]
    assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"]
    assert zero["reduce_bucket_size"] % 2 == 0
    assert zero["reduce_bucket_size"] >= min(learning, 500_000_000)


def test_bf16_learns(data: Path, tmp_path: Path) -> None:
    align(config(data, {"learn": EVERYTHING_BUT_TOWER, "precision": "bf16", "steps": 16}), tmp_path)
    curve = losses(tmp_path / "stage1")
    assert curve[-1] < 0.6 * curve[0]
    assert {tensor.dtype for tensor in tensors(tmp_path / "model", "llm").values()} == {torch.bfloat16}


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_lora_learns_and_is_merged_into_the_saved_model(data: Path, tmp_path: Path, zero_stage: int) -> None:
    rules = [*PROJECTOR, {"match": "llm.*_proj.weight", "learn": "lora"}]
    align(config(data, {"learn": rules, "lora": {"rank": 4}, "zero_stage": zero_stage}), tmp_path)
    before, after = load_file(data / "llm" / "model.safetensors"), tensors(tmp_path / "model", "llm")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    curve = losses(tmp_path / "stage1")
    assert curve[-1] < curve[0]


def test_projector_weights_are_where_stage_one_left_them(data: Path, tmp_path: Path) -> None:
    align(config(data, {"learn": PROJECTOR}), tmp_path / "one")
    left = tmp_path / "one" / "model" / "projector"
    rules = [{"match": "llm.*"}]
    align(config(data, {"learn": rules}, projector_weights=str(left)), tmp_path / "two")
    assert same(
        tensors(tmp_path / "two" / "model", "projector"), tensors(tmp_path / "one" / "model", "projector")
    )


def test_bad_records_are_listed_counted_and_limited(data: Path, tmp_path: Path) -> None:
    colour_records(tmp_path, 16)
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    (tmp_path / "images" / "5.png").unlink()
    files = {"file": str(tmp_path / "train.json"), "image_folder": str(tmp_path / "images"), "workers": 1}
    allowed = config(data, {"learn": PROJECTOR, "data": {**files, "max_bad_share": 0.2}})
    figures = align(allowed, tmp_path / "run")
    assert figures["stage1"]["replaced"] == 8  # 8 steps of 8 are 4 epochs, with both records in each
    listed = (tmp_path / "run" / "stage1" / "bad_samples.jsonl").read_text().splitlines()
    assert sorted("'r3'" in line for line in listed) == [False, True]
    with pytest.raises(DataError, match=r"1 of 16 records cannot be used, max_bad_share allows 0"):
        align(config(data, {"learn": PROJECTOR, "data": files}), tmp_path / "strict")


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(VlmVisionError, match="is not finite"):
        align(config(data, {"learn": EVERYTHING_BUT_TOWER, "lr": 1e30, "grad_clip": None}), tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("stage", "model", "said"),
    [
        ({"learn": [{"match": "projektor.*"}]}, {}, "matches no parameter; did you mean 'projector'"),
        ({"max_length": 500}, {}, "max_length 500 is more than the 128 positions"),
        ({"max_length": 16}, {}, "one picture takes 16 tokens, max_length is 16"),
        ({}, {"llm": "/nowhere/no-model"}, "'/nowhere/no-model': there is no such folder"),
        ({}, {"chat_template": "none.jinja"}, "none.jinja"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    data: Path, tmp_path: Path, stage: dict[str, Any], model: Any, said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        align(config(data, {"learn": PROJECTOR, **stage}, **model), tmp_path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("stage", "model", "said"),
    [
        ({}, {"projector": {"name": "token_packer", "levels": 1, "scale": 3}}, "sides that fit: 1, 2, 4"),
        ({}, {"projector": {"name": "token_packer", "levels": 5}}, "64 channels are no 5 layers"),
        ({}, {"projector": {"name": "qformer", "num_queries": 64}}, "takes 64 tokens, max_length is 64"),
        ({"max_length": 500}, {}, "max_length 500 is more than the 128 positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    data: Path, tmp_path: Path, stage: dict[str, Any], model: Any, said: str
) -> None:
    """Neither the tower nor the language model has any here."""
    for part in ("tower", "llm"):
        shutil.copytree(data / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    parts = {"tower": str(tmp_path / "tower"), "llm": str(tmp_path / "llm"), **model}
    with pytest.raises(ConfigError) as error:
        align(config(data, {"learn": PROJECTOR}, {"learn": PROJECTOR, **stage}, **parts), tmp_path / "run")
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"epochs": 2}, "give the length of the stage once"),
        ({"micro_batch_size": 3}, "batch_size 8 is no multiple of micro_batch_size 3"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"precison": "bf16"}, "did you mean 'precision'"),
        ({"learn": []}, "learn"),
        ({"name": "../up"}, "name"),
        ({"name": "model"}, "none may be 'model'"),
    ],
)
def test_wrong_settings_are_refused(data: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(data, {"learn": PROJECTOR, **stage})
    assert said in str(error.value)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_instruction_aware_projector_learns_in_stages_and_answers(
    zero_stage: int, data: Path, tmp_path: Path
) -> None:
    """Pictures and texts of several lengths, and text alone; the tokenizer goes along from stage to stage."""
    projector = {"name": "qformer_text", "layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 4}
    tiny_llm(tmp_path / "words")
    stages = ({"learn": PROJECTOR}, {"learn": EVERYTHING_BUT_TOWER, "steps": 30, "zero_stage": zero_stage})
    named = config(data, *stages, projector={**projector, "tokenizer": str(tmp_path / "words")})
    figures = align(named, tmp_path / "run")
    assert figures["stage2"]["loss"] < losses(tmp_path / "run" / "stage1")[0]
    shutil.rmtree(tmp_path / "words")
    model = VisionLanguageModel.from_pretrained(tmp_path / "run" / "model")
    assert model.projector.config.vocab_size == len(model.tokenizer)  # type: ignore[attr-defined]
    answers = answer_questions(model, Conversations(data / "train.json", data / "images"))
    assert vqa_accuracy(answers)["all"] > 0.5


def test_random_language_model_only_when_asked_for(data: Path, tmp_path: Path) -> None:
    rules = [{"match": "projector.*"}]
    settings = config(data, {"learn": rules}, llm_weights="none", tower=TOWER)
    align(settings, tmp_path)
    assert load_config(AlignConfig, tmp_path / "config.yaml") == settings
    stored, built = load_file(data / "llm" / "model.safetensors"), tensors(tmp_path / "model", "llm")
    assert not torch.equal(stored["lm_head.weight"], built["lm_head.weight"])


SHIPPED = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if {"model", "stages"} == read_yaml(path).keys()
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name: str) -> None:
    settings = load_config(AlignConfig, CONFIGS / f"{name}.yaml")
    for template in {settings.model.chat_template, *(stage.chat_template for stage in settings.stages)} - {
        None
    }:
        assert read_template(str(template))


def test_llava_configs_have_the_published_settings() -> None:
    one, two = (load_config(AlignConfig, CONFIGS / f"llava15_7b_stage{n}.yaml") for n in (1, 2))
    first, second = one.stages[0], two.stages[0]
    assert [(s.lr, s.batch_size, s.epochs, s.zero_stage) for s in (first, second)] == [
        (1e-3, 256, 1, 2),
        (2e-5, 128, 1, 3),
    ]
    for stage in (first, second):
        assert (stage.warmup, stage.weight_decay, stage.grad_clip, stage.max_length) == (
            0.03,
            0.0,
            None,
            2048,
        )
        assert (stage.precision, stage.activation_checkpointing) == ("bf16", True)
    assert json.loads(one.model.projector.model_dump_json()) == {
        "name": "mlp",
        "depth": 2,
        "activation": "gelu",
    }


@pytest.mark.parametrize(
    ("name", "published"),
    # Of each stage: rate, batch, ZeRO stage, and rates of parts that have their own.
    [
        ("llava15_13b_stage1", [(1e-3, 256, 2, {})]),
        ("llava15_13b_stage2", [(2e-5, 128, 3, {})]),
        ("llava15_7b_lora", [(2e-4, 128, 3, {"projector.*": 2e-5})]),
        ("llava15_7b_qlora", [(2e-4, 128, 2, {"projector.*": 2e-5})]),
        ("llava_next_7b", [(1e-3, 512, 3, {}), (1e-5, 128, 3, {"vision_tower.*": 2e-6})]),
        ("blip2_align", [(1e-4, 1024, 2, {})]),
        ("small_24gb", [(1e-3, 256, 0, {}), (2e-5, 128, 0, {})]),
    ],
)
def test_published_rates(name: str, published: list[Any]) -> None:
    stages = load_config(AlignConfig, CONFIGS / f"{name}.yaml").stages
    for stage, (lr, batch_size, zero_stage, own) in zip(stages, published, strict=True):
        assert (stage.lr, stage.batch_size, stage.zero_stage) == (lr, batch_size, zero_stage)
        assert {rule.match: rule.lr for rule in stage.learn if rule.lr is not None} == own
        assert (stage.precision, stage.activation_checkpointing) == ("bf16", True)


def test_lora_configs_name_the_linear_layers_of_vicunas_blocks() -> None:
    lora, qlora = (
        load_config(AlignConfig, CONFIGS / f"llava15_7b_{name}.yaml") for name in ("lora", "qlora")
    )
    for settings in (lora, qlora):
        stage = settings.stages[0]
        assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (128, 256, 0.05)
    assert (lora.stages[0].quantise, qlora.stages[0].quantise) == ("none", "nf4")
    parts = {part.name: part.learning for part in plan_align(lora).stages[0].parts}
    # Rank 128 in q, k, v, o (2 x 4096 each) and gate, up, down (4096 + 11008 each) of 32 blocks.
    assert parts["llm"] == 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008)) == 319_815_680
