"""The loop of the representation stage, on one process or many (torchrun)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.tower import VisionTower, load_tower
from vlm_vision.train.caption_tokenizer import CaptionTokenizer
from vlm_vision.train.checkpoint import find_checkpoint, save_checkpoint
from vlm_vision.train.contrastive import Meter
from vlm_vision.train.embedding_cache import EmbeddingCache
from vlm_vision.train.held_out import open_captioned
from vlm_vision.train.optim import (
    build_optimizer,
    continue_schedule,
    parameter_groups,
    warmup_cosine,
    warmup_steps,
)
from vlm_vision.train.pairs import BAD_FILE, BadSamples, Batch, Pairs, training_loader
from vlm_vision.train.parallel import (
    Parallel,
    Ranks,
    clip_gradients,
    load_optimizer,
    optimizer_state,
    sum_over_ranks,
    whole_state,
)
from vlm_vision.train.representation import RepresentationModel
from vlm_vision.train.representation_config import RepresentationConfig
from vlm_vision.train.representation_objective import Outcome, RepresentationObjective, gumbel_noise
from vlm_vision.train.representation_scores import validate_representation
from vlm_vision.train.run import Run, plain_attention, prepare_process, refuse_step, training_attention
from vlm_vision.train.termination import Terminated, end_saved
from vlm_vision.train.vlm import token_grid

LARGEST_SCALE = 100.0  # of similarities (CLIP, arXiv:2103.00020, section 2.5)


@training_attention()
def train_representation(
    config: RepresentationConfig, output: str | Path, *, resume: bool = False
) -> dict[str, float]:
    """Train a Q-Former on a frozen tower's patches and captions.

    Args:
        output: run folder; its `checkpoints/` are what `resume` continues from, bit-exact on one machine. At
            the end: `projector`, which `align` takes as `projector_weights`, and `representation`, the whole
            model with its text side and heads (`RepresentationModel.from_pretrained`).

    Returns:
        The last validation scores, or the last losses where nothing is validated.

    Raises:
        ConfigError: parts that do not fit, or a batch that does not fit the data.
        DataError: data that cannot be read, or an output folder with another run in it.
        WeightsError: a BERT of other sizes.
        VlmVisionError: a loss that is not finite.
        SystemExit: SIGTERM came, and a checkpoint is saved.
    """
    require("train", "datasets", "tensorboard")
    prepare_process(config.seed)
    ranks = Ranks.join()
    output = Path(output)
    found = find_checkpoint(output / "checkpoints", resume)
    start = found[0] if found else 0
    if (output / "projector").exists():
        raise DataError(f"{output} already holds a trained Q-Former: give another output folder")

    pairs = Pairs(config.data)
    if config.validation.retrieval is not None:  # what is wrong with it shows now, not when training is done
        open_captioned(config.validation.retrieval)
    tower = load_tower(config.tower).requires_grad_(False).eval().to(ranks.device)
    tower.image_processor.check_one_size("a Q-Former's representation stage")
    torch.manual_seed(config.seed)
    model = build_representation(config, tower)
    total_steps = config.total_steps(pairs.epoch_size)
    if start >= total_steps:
        raise ConfigError(f"{output} is at step {start}, and this config ends at {total_steps}: train longer")
    learner = Learner(model, tower, config, pairs, total_steps=total_steps, ranks=ranks)
    if found:
        learner.load(found[1])
    if ranks.rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters learn; {learner.tells_of_patches}")

    run = Run(output, config, resume_step=start, wandb=config.wandb)
    losses = _train(learner, run, pairs, start)
    scores = learner.validate()
    run.log(total_steps, **scores)
    run.close()
    if run.is_main:
        model.cpu().save_pretrained(output / "representation")
        model.save_projector(output / "projector")
    ranks.leave()
    return scores or losses


def build_representation(config: RepresentationConfig, tower: VisionTower) -> RepresentationModel:
    """The model as a run begins, on the CPU, the same one after the same `torch.manual_seed`.

    Raises:
        ConfigError, WeightsError: tokenizer or BERT cannot be loaded, or do not fit.
    """
    tokenizer = CaptionTokenizer(config.tokenizer or str(config.bert), config.max_text_tokens)
    model = RepresentationModel(
        config.qformer,
        tower.hidden_size,
        token_grid(tower),
        tokenizer,
        embed_dim=config.objective.embed_dim,
        temperature=config.objective.temperature,
    )
    if config.bert is not None:
        model.load_bert(config.bert)
    if config.checkpoint_activations:
        model.qformer.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _train(learner: Learner, run: Run, pairs: Pairs, start: int) -> dict[str, float]:
    """Every step from `start` on; gives the last losses."""
    config, ranks, total_steps = learner.config, learner.ranks, learner.total_steps
    bad = BadSamples(run.folder / BAD_FILE, pairs, is_main=run.is_main)
    meter = Meter(config.batch_size)
    batches: Iterator[Batch | DataError] = iter(
        training_loader(
            pairs,
            learner.tower.image_processor,
            learner.model.tokenizer,
            config.augment,
            seed=config.seed,
            batch_size=config.batch_size,
            start=start,
            stop=total_steps,
            rank=ranks.rank,
            world=ranks.world,
            workers=config.workers,
        )
    )
    learner.model.train()
    with Terminated() as terminated, run.progress(total_steps, "representation", start=start) as bar:
        for step, batch in enumerate(batches, start=start + 1):
            if isinstance(batch, DataError):
                raise batch
            meter.waited()
            lr = float(learner.schedule.get_last_lr()[0])
            result = learner.step(batch, step, asks=(float(terminated.is_set), float(len(batch.bad))))
            must_stop, any_bad = (bool(asked) for asked in result.asks)
            if any_bad:
                bad.note(ranks.gather(batch.bad))
            meter.note(batch, skipped=False)
            bar.update()
            is_last = step == total_steps
            if step % config.log_every == 0 or is_last:
                bar.set_postfix(loss=f"{result.values['loss']:.3f}", refresh=False)
                scale = float(learner.model.logit_scale.detach().exp())
                run.log(step, **result.values, lr=lr, logit_scale=scale, **meter.rates())
            every = config.validation.every
            if every and step % every == 0 and not (is_last or must_stop):
                run.log(step, **learner.validate())
            must_save = config.save_every is not None and step % config.save_every == 0
            if (must_save or must_stop) and not is_last and run.is_main:
                state = learner.state()
                save_checkpoint(
                    run.checkpoints,
                    step,
                    lambda folder, state=state: Learner.write(state, folder),  # type: ignore[misc]
                    keep=config.keep_checkpoints,
                )
            if must_stop and not is_last:
                end_saved(run, step, ranks.leave)
            meter.start()
    if meter.truncated and run.is_main:
        print(
            f"{meter.truncated:,} of {meter.seen:,} captions were longer than max_text_tokens "
            f"{config.max_text_tokens} and lost their end"
        )
    return {name: result.values[name] for name in ("loss", "itc", "itm", "itg")}


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step tells.

    Attributes:
        values: loss, its three parts and their accuracies, mean over ranks; norm of the gradient.
        asks: what ranks asked for in common, summed over them.
    """

    values: Mapping[str, float]
    asks: tuple[float, ...]


class Learner:
    """The model with its frozen tower, optimizer and schedule."""

    def __init__(
        self,
        model: RepresentationModel,
        tower: VisionTower,
        config: RepresentationConfig,
        pairs: Pairs,
        *,
        total_steps: int,
        ranks: Ranks,
    ) -> None:
        self.model, self.tower, self.config, self.ranks = model.to(ranks.device), tower, config, ranks
        self.total_steps = total_steps
        plain_attention(model.qformer)
        self.parallel = Parallel(RepresentationObjective(model, config.objective), "ddp", ranks.world)
        groups = parameter_groups(model, (), lr=config.lr, weight_decay=config.weight_decay)
        self.optimizer = build_optimizer("adamw", groups, betas=config.betas, eps=config.eps)
        warmup = warmup_steps(total_steps, config.warmup)
        floor = config.min_lr / config.lr
        self.schedule = warmup_cosine(self.optimizer, total_steps, warmup, floor)
        gigabytes = 4 * len(pairs) * math.prod((*token_grid(tower), tower.hidden_size)) / 1e9
        self._cache: EmbeddingCache | None = None
        if not config.augment.is_fixed:
            self.tells_of_patches = "pictures are cropped anew each time, so patches are not kept"
        elif gigabytes > config.cache_gb:
            self.tells_of_patches = f"patches take {gigabytes:.1f} GB, more than cache_gb, and are not kept"
        else:
            self._cache = EmbeddingCache(self._patches, ranks.world)
            self.tells_of_patches = f"patches are computed once and kept, {gigabytes:.2f} GB in all"

    # --- A step

    def step(self, batch: Batch, number: int, asks: Sequence[float] = ()) -> StepResult:
        """Forward, backward and the optimizer's step `number` (from 1).

        Args:
            asks: numbers that are summed over ranks with the loss, in the same exchange.

        Raises:
            VlmVisionError: a loss or gradient that is not finite; names the samples, and no weight has
                changed.
        """
        config, ranks, device = self.config, self.ranks, self.ranks.device
        pixels = self.tower.image_processor.normalise(batch.squares.to(device, non_blocking=True))
        patches = self._patches(pixels) if self._cache is None else self._cache.embed(batch.indices, pixels)
        # Dropout draws from here; seeding by step makes a resumed run draw the same.
        torch.manual_seed(config.seed * 1_000_003 + number * ranks.world + ranks.rank)
        noise = gumbel_noise(config.batch_size, config.seed, number)[:, ranks.rank :: ranks.world]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            outcome: Outcome = self.parallel.module(
                patches=patches,
                ids=batch.tokens[batch.captions].to(device),
                identities=batch.identities.to(device),
                noise=noise.to(device),
            )
        outcome.total.backward()  # type: ignore[no-untyped-call]
        names = ("total", "itc", "itm", "itg", "itc_accuracy", "itm_accuracy")
        ours = [float(getattr(outcome, name).detach()) for name in names]
        norms = clip_gradients({"all_of_it": list(self.model.parameters())}, config.grad_clip or math.inf)
        bad = float(not math.isfinite(ours[0]))
        summed = sum_over_ranks([*ours, bad, *asks], ranks.world, device)
        means = dict(zip(("loss", *names[1:]), (value / ranks.world for value in summed), strict=False))
        if summed[len(ours)] or not math.isfinite(norms["all"]):
            self._refuse(batch, outcome, patches, number, means["loss"], norms["all"])
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        return StepResult({**means, "grad_norm": norms["all"]}, tuple(summed[len(ours) + 1 :]))

    def validate(self) -> dict[str, float]:
        """Scores on held-out pictures; every rank must ask."""
        with self.autocast():
            return validate_representation(
                self.model, self.tower, self.config.validation, group=self.ranks.group
            )

    def autocast(self) -> torch.autocast:
        is_half = self.config.precision == "bf16"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=is_half)

    @torch.no_grad()
    def _patches(self, pixels: Tensor) -> Tensor:
        with self.autocast():
            patches: Tensor = self.tower(pixels).float()
        return patches

    def _refuse(
        self, batch: Batch, outcome: Outcome, patches: Tensor, number: int, loss: float, grad_norm: float
    ) -> NoReturn:
        finite = (outcome.finite & patches.isfinite().flatten(1).all(dim=1)).tolist()
        culprits = [name for name, is_finite in zip(batch.names, finite, strict=True) if not is_finite]
        refuse_step(number, loss, grad_norm, self.ranks.rank, "features", culprits, batch.names)

    # --- State

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds, on the CPU."""
        return {
            "model": whole_state(self.model.state_dict()),
            "optimizer": optimizer_state(self.optimizer, dict(self.model.named_parameters())),
            "progress": {"steps": self.schedule.last_epoch},
        }

    @staticmethod
    def write(state: Mapping[str, Any], folder: Path) -> None:
        """Write what `state` gave."""
        tensors = {name: tensor.contiguous() for name, tensor in state["model"].items()}
        save_file(tensors, folder / "model.safetensors")
        torch.save(state["optimizer"], folder / "optimizer.pt")
        (folder / "progress.json").write_text(json.dumps(state["progress"]), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take the state of a checkpoint, written at whatever world size.

        Raises:
            ConfigError: a model of other sizes learnt there.
        """
        try:
            self.model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ConfigError(f"{folder}: another model learnt there than in this config: {error}") from error
        kept = torch.load(folder / "optimizer.pt", map_location=self.ranks.device, weights_only=True)
        load_optimizer(self.optimizer, dict(self.model.named_parameters()), kept)
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        continue_schedule(self.schedule, progress["steps"])
