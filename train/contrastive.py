"""The contrastive loop: from scratch, LoRA, or full, on one process or many (torchrun)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_vision.adapters.lora import check_lora_gradients, has_lora, merge_lora
from vlm_vision.adapters.save import save_lora
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError, nearest, require
from vlm_vision.train.checkpoint import find_checkpoint, save_checkpoint
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.contrastive_report import REPORT_FILE, write_contrastive_report
from vlm_vision.train.learner import Learner
from vlm_vision.train.objective import Objective
from vlm_vision.train.pairs import BAD_FILE, BadSamples, Batch, Pairs, training_loader
from vlm_vision.train.parallel import Ranks
from vlm_vision.train.prepared import load_start, prepare_model, with_learnt
from vlm_vision.train.run import Run, peak_memory_mb, prepare_process, read_metrics, training_attention
from vlm_vision.train.termination import Terminated, end_saved
from vlm_vision.train.validation import check_validation, evaluate, validate_dual_encoder


@training_attention()
def train_contrastive(
    config: ContrastiveConfig, output: str | Path, *, resume: bool = False
) -> dict[str, float]:
    """Train a dual encoder on pictures with captions and save it as `output/model`.

    Args:
        output: run folder; its `checkpoints/` are what `resume` continues from, bit-exact on one machine.
            Saved on the way: `best`, by the config's `best_by`; at the end: `model`, adapters merged into it,
            `model_ema`, `adapter` in peft's format, `report.html`.

    Returns:
        The last validation scores, or the last loss where nothing is validated.

    Raises:
        ConfigError: rules that name nothing, or a batch that does not fit the data.
        DataError: data that cannot be read.
        VlmVisionError: a loss that is not finite.
        SystemExit: SIGTERM came, and a checkpoint is saved.
    """
    require("train", "datasets", "matplotlib", "peft", "tensorboard")
    prepare_process(config.seed)
    ranks = Ranks.join()
    found = find_checkpoint(Path(output) / "checkpoints", resume)
    start = found[0] if found else 0
    if (Path(output) / "model").exists():
        raise DataError(f"{output} already holds a trained model: give another output folder")

    pairs = Pairs(config.data)
    check_validation(config.validation)  # what is wrong with it shows now, not when training is done
    prepared = prepare_model(config, pairs.num_pairs)
    total_steps = config.total_steps(pairs.epoch_size)
    if start >= total_steps:
        raise ConfigError(f"{output} is at step {start}, and this config ends at {total_steps}: train longer")
    if ranks.rank == 0:
        prepared.tell(config, pairs)
    objective = Objective(prepared.model, config.loss_of_run())
    batches = _batches(prepared.model, pairs, config, start, total_steps, ranks)
    learner = Learner(
        objective,
        config,
        prepared.rules,
        prepared.lr,
        total_steps=total_steps,
        ranks=ranks,
    )
    if found:
        learner.load(found[1])

    run = Run(output, config, resume_step=start, wandb=config.wandb)
    loss = _train(learner, batches, run, pairs, start)
    weights = learner.weights()
    del objective, learner
    scores: dict[str, float] = {}
    after, found_after = prepared.model, None
    # The averaged weights first, so that what is reported of in the end are the last ones.
    for name, prefix, learnt in (
        ("model_ema", "ema_", weights.get("average")),
        ("model", "", weights["learnt"]),
    ):
        if learnt is None:
            continue
        after = _save_model(config, pairs.num_pairs, learnt, run, name).to(ranks.device)
        found_after = evaluate(after, config.validation, group=ranks.group)
        scores |= {f"{prefix}{key}": value for key, value in found_after.scores.items()}
    if _is_best(scores, best_score(run, config), config) and run.is_main:
        after.save_pretrained(run.folder / "best")
    run.log(total_steps, **scores)
    run.close()
    ranks.leave()
    if run.is_main and config.report:
        before = None if prepared.recipe == "scratch" else load_start(config).to(ranks.device)
        projector = config.projector
        write_contrastive_report(
            run.folder, before, after, config, found_after=found_after, projector=projector
        )
        print(f"report: {run.folder / REPORT_FILE}")
    return scores or {"loss": loss}


def _train(
    learner: Learner, batches: Iterator[Batch | DataError], run: Run, pairs: Pairs, start: int
) -> float:
    """Every step from `start` on; gives the last loss."""
    config, model, total_steps = learner.config, learner.objective.model, learner.total_steps
    bad = BadSamples(run.folder / BAD_FILE, pairs, is_main=run.is_main)
    meter, best = Meter(config.batch_size), best_score(run, config)
    learner.train_mode()
    last_save = time.monotonic()
    with Terminated() as terminated, run.progress(total_steps, "contrastive", start=start) as bar:
        for step, batch in enumerate(batches, start=start + 1):
            if isinstance(batch, DataError):
                raise batch
            meter.waited()
            is_due = config.save_minutes is not None and run.is_main
            is_due = is_due and time.monotonic() - last_save > 60 * (config.save_minutes or 0)
            used_lr = learner.schedule.get_last_lr()[0]
            asks = (float(terminated.is_set), float(is_due), float(len(batch.bad)))
            result = learner.step(batch, step, asks=asks)
            must_stop, must_save, any_bad = (bool(asked) for asked in result.asks)
            if any_bad:
                bad.note(learner.ranks.gather(batch.bad))
            if step == start + 1:
                check_lora_gradients(model)
            meter.note(batch, result.skipped)
            bar.update()
            if step % config.log_every == 0 or step == total_steps:
                bar.set_postfix(loss=f"{result.loss:.3f}", refresh=False)
                run.log(
                    step,
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    **{f"grad_norm_{part}": norm for part, norm in result.part_norms.items()},
                    lr=float(used_lr),
                    logit_scale=result.logit_scale,
                    accuracy=result.accuracy,
                    **meter.rates(),
                )
            is_last = step == total_steps
            must_save |= config.save_every is not None and step % config.save_every == 0
            if (must_save or must_stop) and not is_last:
                _save(learner, run, step)
                last_save = time.monotonic()
            if must_stop and not is_last:
                end_saved(run, step, learner.ranks.leave)
            every = config.validation.every
            if every and step % every == 0 and not is_last:
                with learner.parallel.gathered():
                    scores = validate_dual_encoder(model, config.validation, group=learner.ranks.group)
                    run.log(step, **scores)
                    if _is_best(scores, best, config):
                        best = scores[config.best_by or ""]
                        _save_model(config, pairs.num_pairs, learner.learnt(), run, "best")
                learner.train_mode()
            meter.start()
    if meter.truncated and run.is_main:
        print(
            f"{meter.truncated:,} of {meter.seen:,} captions were longer than the text tower's "
            f"{model.tokenizer.context_length} tokens and lost their end"
        )
    return result.loss


def _save(learner: Learner, run: Run, step: int) -> None:
    # Where parameters are split, every rank gives its part.
    state = learner.state() if run.is_main or learner.config.parallel == "fsdp" else {}
    if run.is_main:
        keep = learner.config.keep_checkpoints
        save_checkpoint(run.checkpoints, step, lambda folder: learner.write(state, folder), keep=keep)


def best_score(run: Run, config: ContrastiveConfig) -> float:
    """The best that the run has logged of the score by which it keeps its best model."""
    lines = read_metrics(run.folder / "metrics.jsonl")
    return max((line[config.best_by] for line in lines if config.best_by in line), default=-math.inf)


def _is_best(scores: Mapping[str, float], best: float, config: ContrastiveConfig) -> bool:
    if config.best_by is None:
        return False
    if config.best_by not in scores:
        raise ConfigError(
            f"best_by {config.best_by!r} is no score of this validation{nearest(config.best_by, scores)} "
            f"(scores: {', '.join(scores)})"
        )
    return scores[config.best_by] > best


def _save_model(
    config: ContrastiveConfig, num_pairs: int, learnt: Mapping[str, Tensor], run: Run, name: str
) -> DualEncoder:
    """The model with what it learnt, adapters merged, saved by one rank in the run's folder."""
    model = with_learnt(prepare_model(config, num_pairs).model, learnt)
    if run.is_main and name == "model" and has_lora(model):
        save_lora(model, run.folder / "adapter")
    merge_lora(model)
    if run.is_main:
        model.save_pretrained(run.folder / name)
    return model.eval()


# --- What comes in


def _batches(
    model: DualEncoder, pairs: Pairs, config: ContrastiveConfig, start: int, stop: int, ranks: Ranks
) -> Iterator[Batch | DataError]:
    """This rank's share of every batch, with pictures to be kept beside it where the config replays any."""
    settings: dict[str, Any] = {
        "seed": config.seed,
        "start": start,
        "stop": stop,
        "rank": ranks.rank,
        "world": ranks.world,
        "workers": config.workers,
    }
    parts = model.image_processor, model.tokenizer, config.augment
    batches = iter(training_loader(pairs, *parts, batch_size=config.batch_size, **settings))
    keep = config.loss.keep
    if keep is None or keep.data is None:
        return batches
    others = Pairs(keep.data)
    size = min(keep.batch_size, len(others) // ranks.world * ranks.world)
    return _with_replay(batches, iter(training_loader(others, *parts, batch_size=size, **settings)))


def _with_replay(
    batches: Iterator[Batch | DataError], others: Iterator[Batch | DataError]
) -> Iterator[Batch | DataError]:
    for batch, other in zip(batches, others, strict=True):
        if isinstance(other, DataError):
            yield other
        elif isinstance(batch, DataError):
            yield batch
        else:
            yield replace(batch, replay=other.squares, bad=batch.bad + other.bad)


# --- What is told


class Meter:
    """Counts and times between two lines of the log."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.seen = self.truncated = self.skipped = 0
        self._duplicates = self._steps = self._pairs = 0
        self._waited = 0.0
        self._since = self._start = time.monotonic()

    def start(self) -> None:
        """A step is over: from here on the loop waits for data."""
        self._start = time.monotonic()

    def waited(self) -> None:
        self._waited += time.monotonic() - self._start

    def note(self, batch: Batch, skipped: bool) -> None:
        self._steps += 1
        self._pairs += len(batch.captions)
        self.seen += len(batch.captions)
        self.truncated += batch.truncated
        self.skipped += skipped
        self._duplicates += count_duplicates(batch.identities)

    def rates(self) -> dict[str, float]:
        """Since the last line: pairs a second over all ranks, share of the time spent waiting for data, share
        of pairs that say what another of this rank's batch says. Over the run: memory, captions cut, steps
        skipped.
        """
        passed = max(1e-9, time.monotonic() - self._since)
        rates = {
            "samples_per_second": self._steps * self._batch_size / passed,
            "data_wait": self._waited / passed,
            "duplicates": self._duplicates / max(1, self._pairs),
            "truncated_captions": self.truncated / max(1, self.seen),
            "memory_mb": peak_memory_mb(),
            "skipped_steps": float(self.skipped),
        }
        self._duplicates = self._steps = self._pairs = 0
        self._waited, self._since = 0.0, time.monotonic()
        return rates


def count_duplicates(identities: Tensor) -> int:
    """Pairs that agree with another in any column: the same caption, or the same picture."""
    is_duplicate = torch.zeros(len(identities), dtype=torch.bool)
    for column in identities.T:
        _, which, counts = column.unique(return_inverse=True, return_counts=True)
        is_duplicate |= counts[which] > 1
    return int(is_duplicate.sum())
