"""A run's folder: config, metrics, TensorBoard, and what a resume keeps of them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from vlm_vision.config import load_config
from vlm_vision.errors import MissingExtraError, VlmVisionError
from vlm_vision.train.pairs_config import AugmentConfig
from vlm_vision.train.run import PeakMemory, Run, check_finite, read_metrics, timed


def test_metrics_are_lines_of_json_and_events(tmp_path: Path) -> None:
    config = AugmentConfig(flip=0.5)
    run = Run(tmp_path / "run", config)
    run.log(1, loss=2.5)
    run.log(2, loss=1.5, lr=0.1)
    run.log(3)
    run.close()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.5), (2, 1.5)]
    assert lines[0]["time"] <= lines[1]["time"]
    assert load_config(AugmentConfig, tmp_path / "run" / "config.yaml") == config
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path, AugmentConfig())
    for step in range(1, 6):
        run.log(step, loss=1.0)
    run.close()
    Run(tmp_path, AugmentConfig(), resume_step=3).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Run(tmp_path, AugmentConfig()).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    run = Run(tmp_path / "run", AugmentConfig())
    run.log(1, loss=1.0)
    run.close()
    assert not run.is_main
    assert not (tmp_path / "run").exists()


def test_a_torn_last_line_is_dropped_and_another_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"step": 1, "loss": 1.0})
    path.write_text(f'{whole}\n{{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    path.write_text(f'{{"step": 2, "lo\n{whole}\n')
    with pytest.raises(VlmVisionError, match="line 1 is not JSON"):
        read_metrics(path)
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan"))])
def test_a_step_that_is_not_finite_is_named(loss: float, norm: float) -> None:
    with pytest.raises(VlmVisionError, match=r"step 7: .* weights are as after step 6"):
        check_finite(loss, norm, 7)
    check_finite(1.0, 1e30, 7)


def test_seconds_add_up() -> None:
    seconds: dict[str, float] = {"a": 1.0}
    with timed(seconds, "a"):
        pass
    with timed(seconds, "b"):
        pass
    assert 1.0 <= seconds["a"] < 1.5
    assert 0.0 <= seconds["b"] < 0.5


def test_peak_memory_counts_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is told to hold 100 MiB: what one really holds changes with who else shares its pages."""
    with PeakMemory() as real:
        pass
    assert real.mb > 50
    memory = SimpleNamespace(pss=100 * 2**20, uss=1)
    monkeypatch.setattr(psutil.Process, "memory_full_info", lambda _: memory)
    with PeakMemory() as alone:
        pass
    wait_for_a_line = "print('here', flush=True); input()"
    with (
        PeakMemory() as both,
        subprocess.Popen([sys.executable, "-c", wait_for_a_line], stdin=-1, stdout=-1, text=True) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        both.look()
        child.communicate("\n")
    assert (alone.mb, both.mb) == (100, 200)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("run", "first"),
    [
        ("vlm_vision.train.align.align", "check_fit"),
        ("vlm_vision.train.language.warm_start_llm", "train_tokenizer"),
        ("vlm_vision.train.contrastive.train_contrastive", "prepare_process"),
        ("vlm_vision.train.representation_stage.train_representation", "prepare_process"),
    ],
)
def test_fused_attention_is_off_while_a_run_lasts(
    monkeypatch: pytest.MonkeyPatch, run: str, first: str, fused: bool
) -> None:
    """However it ends: here, by what the run does first."""
    while_it_ran: list[bool] = []

    def ends(*_: object) -> None:
        while_it_ran.append(torch.backends.cuda.flash_sdp_enabled())
        raise VlmVisionError("ended")

    module, _, name = run.rpartition(".")
    monkeypatch.setattr(f"{module}.{first}", ends)
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(fused)
    try:
        function = getattr(importlib.import_module(module), name)
        config = SimpleNamespace(seed=0, vocab_size=9)
        with pytest.raises(VlmVisionError, match="ended"):
            function(config, "out") if "language" not in run else function([], [], config, "out")
        assert while_it_ran == [fused and torch.cuda.is_available()]
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def test_numpy_does_not_warn_that_denormals_are_gone() -> None:
    """In a process of its own: both the flushing and what numpy keeps of its limits are the process's."""
    code = (
        "import warnings; from vlm_vision.train.run import prepare_process; prepare_process(0); "
        "warnings.simplefilter('error'); import numpy; print(numpy.finfo('float32'), numpy.finfo('float64'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=900)


def test_a_run_logs_to_weights_and_biases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a stand-in for the library: what it is told."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "wandb.py").write_text(
        "told = []\n"
        "class _Run:\n"
        "    def log(self, values, step): told.append((step, values))\n"
        "    def finish(self): told.append('finished')\n"
        "def init(**settings):\n"
        "    told.append(settings)\n"
        "    return _Run()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "library")
    run = Run(tmp_path / "run", AugmentConfig(flip=0.5), wandb="a project")
    run.log(3, loss=1.5)
    run.close()
    import wandb

    monkeypatch.delitem(sys.modules, "wandb")
    settings, logged, end = wandb.told
    assert settings["project"] == "a project"
    assert settings["id"] == "run"
    assert settings["config"]["flip"] == 0.5
    assert (logged, end) == ((3, {"loss": 1.5}), "finished")


def test_weights_and_biases_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm_vision\[wandb\]'"):
        Run(tmp_path / "run", AugmentConfig(), wandb="a project")
