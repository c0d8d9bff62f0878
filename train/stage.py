"""One alignment stage: who learns, the data, and the loop on the DeepSpeed engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from vlm_vision.adapters.lora import has_lora
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.train.align_config import Stage
from vlm_vision.train.checkpoint import find_checkpoint
from vlm_vision.train.conversations import (
    Batch,
    ConversationDataset,
    Conversations,
    MixedConversations,
    Sample,
    collate,
)
from vlm_vision.train.deepspeed_engine import (
    current_device,
    engine_settings,
    gradient_norm,
    make_whole,
    mean_over_ranks,
    start_engine,
)
from vlm_vision.train.engine_checkpoint import load_engine, save_engine
from vlm_vision.train.lean_loading import shard
from vlm_vision.train.length_groups import LengthGroups
from vlm_vision.train.optim import (
    parameter_groups,
    set_learning,
    trainable_summary,
    warmup_schedule,
)
from vlm_vision.train.pairs import EpochBatches, write_bad_list
from vlm_vision.train.patch_cache import kept_features
from vlm_vision.train.quantise import check_adapters_alone
from vlm_vision.train.run import Run, check_finite, plain_attention
from vlm_vision.train.termination import Terminated, end_saved, outlive_sigterm
from vlm_vision.train.vlm import VisionLanguageModel, embedding_width


def run_stage(
    model: VisionLanguageModel,
    conversations: Conversations | MixedConversations,
    measured: NDArray[Any],
    stage: Stage,
    seed: int,
    folder: Path,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train the model in place; afterwards it is whole on rank 0, with LoRA not merged yet.

    Args:
        measured: the records of the conversations, see `measure_for_training`.

    Returns:
        `parts` that learnt, and `figures`.

    Raises:
        SystemExit: SIGTERM came, and a checkpoint is saved.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    at_once = stage.conversations_at_once(world)
    data = _dataset(model, conversations, stage)
    total = stage.total_steps(data.conversations.epoch_size)
    found = find_checkpoint(folder / "checkpoints", resume)
    start = found[0] if found else 0
    run = Run(folder, stage, resume_step=start)

    _set_learning(model, stage)
    if stage.sources[0].feature_cache is not None:
        data.features = kept_features(model.vision_tower, data.conversations, data.tiles, stage, total)
    summary = trainable_summary(model)
    if run.is_main:
        print(f"stage {stage.name!r}: {total} steps, batch {stage.batch_size}, ZeRO-{stage.zero_stage}")
        for part, (count, everything) in summary.items():
            print(f"  {part}: {count:,} of {everything:,} parameters learn")
    parts = [
        part
        for part in model.parts  # the end of rows comes from nowhere else, so it is left, learnt or not
        if part == "tiles" or any(p.requires_grad for p in model.part(part).parameters())
    ]
    groups = parameter_groups(model, stage.learn, lr=stage.lr, weight_decay=stage.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=stage.betas, fused=True)
    schedule = warmup_schedule(optimizer, stage.schedule, total, stage.warm_steps(total), stage.lr_floor)
    learning = sum(count for count, _ in summary.values())
    plain_attention(model.llm)
    settings = engine_settings(stage, world, at_once, embedding_width(model.llm), learning)
    if stage.zero_stage == 3:
        dtype = torch.bfloat16 if stage.precision == "bf16" else torch.float32
        shard(model, settings, dtype, current_device())
    engine = start_engine(model, optimizer, schedule, settings)
    if found:
        load_engine(engine, found[1])

    bad = BadRecords(folder / "bad_samples.jsonl", data.conversations)
    # Records replaced, texts truncated; tokens, places that they took, and would take one in a row.
    counts = torch.zeros(5, dtype=torch.long, device=engine.device)
    began = time.perf_counter()
    loss = float("nan")
    engine.train()
    batches = _loader(data, measured, stage, seed, start, total, at_once)
    with Terminated() as terminated, run.progress(total, stage.name, start=start) as bar:
        for step, pieces in enumerate(batches, start=start + 1):
            # Dropout draws from here; seeding by step makes a resumed run draw the same.
            torch.manual_seed(seed * 1_000_003 + step * world + rank)
            rate = float(schedule.get_last_lr()[0])
            new = bad.new(pieces)
            loss, grad_norm, must_stop, must_note = _optimizer_step(
                engine, pieces, step, terminated, has_bad=bool(new)
            )
            if must_note:
                bad.note(new)
            for piece in pieces:
                places = [piece.num_tokens, piece.input_ids.numel(), piece.padded_positions]
                noted = [len(piece.replaced), piece.truncated, *places]
                counts += torch.tensor(noted, device=engine.device)
            bar.update()
            is_last = step == total
            if step % stage.log_every == 0 or is_last:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                run.log(step, loss=loss, grad_norm=grad_norm, lr=rate)
            must_save = stage.save_every is not None and step % stage.save_every == 0
            if (must_save or must_stop) and not is_last:
                save_engine(engine, run.checkpoints, step)
            if must_stop and not is_last:
                end_saved(run, step, engine.destroy)
    run.close()
    seconds = time.perf_counter() - began
    make_whole(model)
    engine.destroy()
    dist.all_reduce(counts)
    replaced, truncated, tokens, taken, padded = counts.tolist()
    figures = {
        "loss": loss,
        "steps": total,
        "seconds": round(seconds, 2),
        "conversations_per_second": round((total - start) * stage.batch_size / seconds, 2),
        "replaced": replaced,
        "truncated": truncated,
        "padding": round(1 - tokens / max(1, taken), 4),
        "padding_saved": round(1 - taken / max(1, padded), 4),
    }
    if run.is_main and stage.packing:
        print(f"  packed: {figures['padding']:.1%} padding; {figures['padding_saved']:.1%} of places saved")
    if run.is_main and (replaced or truncated):
        print(f"  {replaced} bad records replaced, {truncated} texts truncated at {stage.max_length} tokens")
    return {"parts": parts, "figures": figures}


class BadRecords:
    """Lists records that were replaced, on any rank, each once, and stops the run when there are too many.

    Raises:
        DataError: as `note`.
    """

    def __init__(self, path: Path, conversations: Conversations | MixedConversations) -> None:
        self.path, self.allowed = path, conversations.max_bad
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._listed = {str(json.loads(line)["error"]) for line in lines}
        dist.barrier()  # all have read it before one writes
        self._list(conversations.bad.values())

    def new(self, pieces: Sequence[Batch]) -> list[str]:
        """Reasons why this rank replaced records that are not listed yet."""
        return sorted({reason for piece in pieces for _, reason in piece.replaced} - self._listed)

    def note(self, reasons: Sequence[str]) -> None:
        """Add what all ranks found; each of them must call.

        Raises:
            DataError: more bad records than `max_bad_share` allows.
        """
        everyones: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, list(reasons))
        self._list(reason for theirs in everyones for reason in theirs)

    def _list(self, reasons: Iterable[str]) -> None:
        new = sorted(set(reasons) - self._listed)
        if new and dist.get_rank() == 0:
            write_bad_list(self.path, new)
        self._listed.update(new)
        if len(self._listed) > self.allowed:
            raise DataError(
                f"{len(self._listed)} records cannot be used, max_bad_share allows {self.allowed}; "
                f"they are listed in {self.path}"
            )


def _optimizer_step(
    engine: Any, pieces: Sequence[Batch], step: int, terminated: Terminated, *, has_bad: bool
) -> tuple[float, float, bool, bool]:
    """One optimizer step on this rank's pieces of the batch.

    Returns:
        Loss and gradient norm of the whole batch, and whether any rank was told to stop, and any `has_bad`.

    The loss is the mean over all label tokens of the batch, however it is split over ranks and pieces.
    """
    labels = torch.tensor(float(sum(piece.num_labels for piece in pieces)), device=engine.device)
    label_count = mean_over_ranks(labels) / len(pieces)
    total = torch.zeros((), device=engine.device)
    for number, piece in enumerate(pieces, start=1):
        output = engine(
            input_ids=piece.input_ids.to(engine.device),
            attention_mask=piece.attention_mask.to(engine.device),
            labels=piece.labels.to(engine.device),
            pixels=None if piece.pixels is None else piece.pixels.to(engine.device),
            position_ids=None if piece.position_ids is None else piece.position_ids.to(engine.device),
            label_count=label_count,
            patches=None if piece.patches is None else piece.patches.to(engine.device),
            text=None if piece.text is None else {k: v.to(engine.device) for k, v in piece.text.items()},
            image_sizes=piece.image_sizes,
        )
        engine.backward(output.loss)
        total += output.loss.detach() / len(pieces)
        if number == len(pieces):
            flags = torch.tensor([float(terminated.is_set), float(has_bad)], device=engine.device)
            loss, stopped, bad = mean_over_ranks(torch.cat([total[None], flags])).tolist()
            grad_norm = gradient_norm(engine)
            check_finite(loss, grad_norm or 0.0, step)
        engine.step()
    if grad_norm is None:
        grad_norm = float(engine.get_global_grad_norm())
        check_finite(loss, grad_norm, step)
    return loss, grad_norm, stopped > 0, bad > 0


def _set_learning(model: VisionLanguageModel, stage: Stage) -> None:
    """Put adapters in and set who learns."""
    check_adapters_alone(model, stage)
    set_learning(model, stage.learn, stage.lora)
    if stage.keep_adapters and not has_lora(model.llm):
        raise ConfigError(
            f"stage {stage.name!r}: keep_adapters, but no rule puts adapters on the language model"
        )
    if stage.activation_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})


def _dataset(
    model: VisionLanguageModel, conversations: Conversations | MixedConversations, stage: Stage
) -> ConversationDataset:
    return ConversationDataset(
        conversations,
        model.chat,
        model.vision_tower.image_processor,
        max_length=stage.max_length,
        too_long=stage.sources[0].too_long,
        instructions=model.instructions,
        tiles=None if model.tiles is None else model.tiles.form,
    )


def _loader(
    data: ConversationDataset,
    measured: NDArray[Any],
    stage: Stage,
    seed: int,
    start: int,
    stop: int,
    micro_batch_size: int,
) -> DataLoader[Any]:
    """This rank's share of every batch from step `start` on, in pieces of the micro batch size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    order = data.conversations.order(seed)
    if stage.group_by_length:
        lengths, pictures = (np.zeros(len(data), dtype=np.int64) for _ in range(2))
        lengths[measured["index"]], pictures[measured["index"]] = measured["kept"], measured["pictures"]
        order = LengthGroups(order, lengths, pictures, stage.batch_size, seed)
    return DataLoader(
        data,
        batch_sampler=EpochBatches(order, stage.batch_size, seed, start, stop, rank, world),
        collate_fn=partial(
            _pieces,
            micro_batch_size=micro_batch_size,
            pad_id=data.chat.pad_id,
            pack_to=stage.max_length if stage.packing else None,
        ),
        num_workers=stage.sources[0].workers,
        worker_init_fn=outlive_sigterm,
    )


def _pieces(
    samples: Sequence[Sample], micro_batch_size: int, pad_id: int, pack_to: int | None
) -> list[Batch]:
    firsts = range(0, len(samples), micro_batch_size)
    return [collate(samples[first : first + micro_batch_size], pad_id, pack_to) for first in firsts]
