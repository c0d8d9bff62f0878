"""The contrastive loop: from scratch, LoRA, or full, on one process or many (torchrun)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from vlm_vision.adapters.lora import add_lora, check_lora_gradients, merge_lora
from vlm_vision.dual_encoder import DualEncoder, load_dual_encoder
from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.train.checkpoint import find_checkpoint, save_checkpoint
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.losses import info_nce_loss
from vlm_vision.train.optim import (
    apply_rules,
    parameter_groups,
    trainable_summary,
    warmup_cosine,
    warmup_steps,
)
from vlm_vision.train.pairs import EpochBatches, Pairs, TrainingPairs, write_bad_list
from vlm_vision.train.recipes import RECIPES, applicable_rules, choose_recipe
from vlm_vision.train.rules import Rule, matching_rule
from vlm_vision.train.run import Run, check_finite, prepare_process
from vlm_vision.train.validation import validate_dual_encoder

MAX_LOGIT_SCALE = math.log(100)  # CLIP, arXiv:2103.00020, section 2.5


def train_contrastive(
    config: ContrastiveConfig, output: str | Path, *, resume: bool = False
) -> dict[str, float]:
    """Train a dual encoder on pictures with captions and save it as `output/model`.

    Args:
        output: run folder; its `checkpoints/` are what `resume` continues from, bit-exact on one machine.

    Returns:
        The last validation scores, or the last loss where nothing is validated.

    Raises:
        ConfigError: rules that name nothing, or a batch that does not fit the data.
        DataError: data that cannot be read.
        VlmVisionError: a loss that is not finite.
    """
    require("train", "datasets", "matplotlib", "peft", "tensorboard")
    prepare_process(config.seed)
    rank, world, device = _join_ranks()
    found = find_checkpoint(Path(output) / "checkpoints", resume)
    start = found[0] if found else 0
    if (Path(output) / "model").exists():
        raise DataError(f"{output} already holds a trained model: give another output folder")

    model = load_dual_encoder(
        config.model if isinstance(config.model, str) else config.model.model_dump(mode="json")
    )
    pairs = Pairs(config.data)
    for held_out in (config.validation.zero_shot, config.validation.retrieval):
        if held_out:
            Pairs(held_out)  # what is wrong with it shows now, not when training is done
    rules, lr = _prepare_learning(model, pairs, config, quiet=rank != 0)
    model.to(device)
    if found:
        _load_learnt(model, found[1])

    total_steps = config.total_steps(len(pairs))
    if start >= total_steps:
        raise ConfigError(f"{output} is at step {start}, and this config ends at {total_steps}: train longer")
    loader = _loader(model, pairs, config, start, total_steps, rank, world)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, rules, lr=lr, weight_decay=config.weight_decay),
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    schedule = warmup_cosine(optimizer, total_steps, warmup_steps(total_steps, config.warmup))
    if found:
        optimizer.load_state_dict(
            torch.load(found[1] / "optimizer.pt", map_location=device, weights_only=True)
        )
        schedule.load_state_dict(json.loads((found[1] / "schedule.json").read_text(encoding="utf-8")))

    run = Run(output, config, resume_step=start)
    parallel: nn.Module = DistributedDataParallel(model) if world > 1 else model
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scores: dict[str, float] = {}
    bad = BadPictures(run.folder / "bad_samples.jsonl", pairs)
    seen = truncated = 0
    _train_mode(model)
    with run.progress(total_steps, "contrastive", start=start) as bar:
        for step, batch in enumerate(loader, start=start + 1):
            if isinstance(batch, DataError):
                raise batch
            bad.note(batch.bad)
            seen, truncated = seen + len(batch.captions), truncated + batch.truncated
            # Dropout draws from here; seeding by step makes a resumed run draw the same.
            torch.manual_seed(config.seed * 1_000_003 + step * world + rank)
            pixels = model.image_processor.normalise(batch.squares).to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                image, distinct, logit_scale = parallel(pixels, batch.tokens.to(device, non_blocking=True))
            # A caption that repeats is encoded once; its embedding's gradients are summed in fp32.
            captions = batch.captions.to(device)
            image, text = image.float(), embedding(captions, distinct.float())
            loss = info_nce_loss(image, text, logit_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = nn.utils.clip_grad_norm_(learning, config.grad_clip)
            if step == start + 1:
                check_lora_gradients(model)
            mean_loss = _mean_over_ranks(loss.detach(), world)
            check_finite(float(mean_loss), float(grad_norm), step)
            optimizer.step()
            used_lr = schedule.get_last_lr()[0]
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            bar.update()
            if step % config.log_every == 0 or step == total_steps:
                bar.set_postfix(loss=f"{float(mean_loss):.3f}", refresh=False)
                run.log(
                    step,
                    loss=float(mean_loss),
                    grad_norm=float(grad_norm),
                    lr=float(used_lr),
                    logit_scale=model.logit_scale.exp().item(),
                    accuracy=_batch_accuracy(image, distinct, captions),
                    truncated_captions=truncated / seen,
                )
            if config.save_every and step % config.save_every == 0 and step < total_steps and run.is_main:
                save_checkpoint(
                    run.checkpoints, step, lambda folder: _write(folder, model, optimizer, schedule)
                )
            every = config.validation.every
            if run.is_main and every and step % every == 0 and step < total_steps:
                run.log(step, **validate_dual_encoder(model, config.validation))
                _train_mode(model)
    if truncated and run.is_main:
        print(
            f"{truncated:,} of {seen:,} captions were longer than the text tower's "
            f"{model.tokenizer.context_length} tokens and lost their end"
        )
    merge_lora(model)
    model.eval()
    if run.is_main:
        model.save_pretrained(run.folder / "model")
        scores = validate_dual_encoder(model, config.validation)
        run.log(total_steps, **scores)
    run.close()
    _leave_ranks(world)
    return scores or {"loss": float(mean_loss)}


def _prepare_learning(
    model: DualEncoder, pairs: Pairs, config: ContrastiveConfig, *, quiet: bool
) -> tuple[Sequence[Rule], float]:
    """Choose the recipe, put adapters in, set who learns, and say so."""
    names = [name for name, _ in model.named_parameters()]
    recipe, reason = choose_recipe(config.recipe, pairs.num_pairs)
    row = RECIPES[recipe]
    rules = config.rules or applicable_rules(row.rules, names)
    lr = config.lr or row.lr
    targets = [name for name in names if (rule := matching_rule(name, rules)) and rule.learn == "lora"]
    if targets:
        add_lora(model, targets, config.lora)
    apply_rules(model, rules)
    if quiet:
        return rules, lr
    print(
        f"recipe {recipe!r}: {reason}; peak learning rate {lr:g}" + ("" if config.lr else f" ({row.source})")
    )
    if pairs.dropped:
        print(f"{pairs.dropped} row(s) without a caption were left out")
    for part, (count, total) in trainable_summary(model).items():
        print(f"  {part}: {count:,} of {total:,} parameters learn")
    if not config.rules and not row.changes_patches:
        print("  the vision layers are frozen, so the patch features that a VLM reads stay as they are")
    return rules, lr


def _loader(
    model: DualEncoder, pairs: Pairs, config: ContrastiveConfig, start: int, stop: int, rank: int, world: int
) -> DataLoader[Any]:
    dataset = TrainingPairs(pairs, model.image_processor, model.tokenizer, config.augment, config.seed)
    sampler = EpochBatches(len(pairs), config.batch_size, config.seed, start, stop, rank, world)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=_as_is,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    return batch


def _train_mode(model: DualEncoder) -> None:
    """Modules of which no weight learns stay in eval mode: no dropout, no moving batch statistics."""
    model.train()
    for module in model.modules():
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()


class BadPictures:
    """Pictures that were replaced, listed once each in a file, up to the share that the config allows."""

    def __init__(self, path: Path, pairs: Pairs) -> None:
        self.path, self.listed = path, set[str]()
        self.allowed = pairs.config.max_bad_share * len(pairs)

    def note(self, errors: Sequence[str]) -> None:
        """Add what a batch replaced.

        Raises:
            DataError: more than `max_bad_share` of all pictures cannot be read.
        """
        new = sorted(set(errors) - self.listed)
        if not new:
            return
        write_bad_list(self.path, new)
        self.listed.update(new)
        if len(self.listed) > self.allowed:
            raise DataError(
                f"{len(self.listed)} pictures cannot be read, max_bad_share allows {self.allowed:g}; "
                f"they are listed in {self.path}"
            )


def _batch_accuracy(image: Tensor, distinct: Tensor, captions: Tensor) -> float:
    """Share of this rank's pictures whose own caption is the nearest of this rank's distinct ones."""
    nearest = (image.detach() @ distinct.detach().float().T).argmax(dim=1)
    return float((nearest == captions).float().mean())


def _learnt(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What differs from the weights a run started from: parameters that learn, and buffers."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
    buffers = dict(model.named_buffers())
    yield from ((name, buffers[name]) for name in model.state_dict().keys() & buffers.keys())


def _write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    save_file({name: tensor.contiguous() for name, tensor in _learnt(model)}, folder / "learnt.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / "schedule.json").write_text(json.dumps(schedule.state_dict()), encoding="utf-8")


def _load_learnt(model: nn.Module, folder: Path) -> None:
    state, wanted = load_file(folder / "learnt.safetensors"), dict(_learnt(model))
    if state.keys() != wanted.keys():
        raise ConfigError(
            f"{folder}: other parameters learnt there than in this config; start a new run instead"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(state[name])


def _join_ranks() -> tuple[int, int, torch.device]:
    """(rank, world size, device) of this process; joins the group that torchrun describes, if any."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def _leave_ranks(world: int) -> None:
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _mean_over_ranks(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
        value /= world
    return value
