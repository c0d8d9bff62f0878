"""Checkpoints of a DeepSpeed engine by parameter: any number of ranks and any ZeRO stage goes on from them.

Each rank writes what it holds of the fp32 weights and of Adam's two moments, and which elements of which
parameter these are. A rank that loads reads its own elements out of the mapped files of all ranks, so nothing
is converted, held whole or written twice. DeepSpeed's own files depend on the number of ranks and the stage;
its universal ones are a second copy, need state that its stages 1 and 2 leave out, and know no stage 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.train.checkpoint import save_checkpoint
from vlm_vision.train.optim import continue_schedule

STATE_FILE, WEIGHTS, MOMENTS = "state.json", "fp32", ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Elements `start` to `start + size` of a flattened parameter: in `flats[flat]`, from `offset` on."""

    flat: int
    offset: int
    start: int
    size: int


@dataclass(frozen=True)
class Held:
    """What this rank holds of the optimizer.

    Attributes:
        adam: the optimizer that has the moments.
        flats: fp32 weights, each a key of its state. Under ZeRO several parameters lie in one of them, and
            one parameter in those of several ranks.
        pieces: of each parameter that this rank holds any of, by name.
        is_copy: whether another rank holds the same, and writes it.
    """

    adam: torch.optim.Optimizer
    flats: list[Tensor]
    pieces: dict[str, Piece]
    is_copy: bool = False


def save_engine(engine: Any, folder: Path, step: int, *, keep: int = 2) -> None:
    """Checkpoint of a step, without the frozen weights, complete or absent. Every rank must call it.

    It takes 12 bytes for each parameter that learns, over all ranks.

    Raises:
        ConfigError: the optimizer's states are on an NVMe disk.
        WeightsError: what was written is not every element of all that learns; there is no checkpoint then.
    """
    held, rank = hold(engine), dist.get_rank()
    learning = learning_shapes(engine.module)

    def write(partial: Path) -> None:
        dist.barrier()  # rank 0 has made the folder
        state = {
            "pieces": {} if held.is_copy else {name: tuple(piece) for name, piece in held.pieces.items()},
            "flats": [] if held.is_copy else [_state_of(flat, held.adam) for flat in held.flats],
            "buffers": dict(_saved_buffers(engine.module)),
        }
        torch.save(state, partial / f"rank_{rank}.pt")
        dist.barrier()  # every rank has written its part
        if rank == 0:
            check_whole(_read(partial), learning)
            told = {"step": step, "learning": learning}
            (partial / STATE_FILE).write_text(json.dumps(told), encoding="utf-8")

    if rank == 0:
        save_checkpoint(folder, step, write, keep=keep)
    else:
        write(folder / f"step_{step}.tmp")
    dist.barrier()


def load_engine(engine: Any, checkpoint: Path) -> None:
    """Continue from a checkpoint, whatever ranks and ZeRO stage wrote it. Every rank must call it.

    Raises:
        ConfigError: other parameters learnt there.
    """
    told = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if told["learning"] != learning_shapes(engine.module):
        raise ConfigError(
            f"{checkpoint}: other parameters learnt there than in this config; start a new run instead"
        )
    held, saved = hold(engine), _read(checkpoint)
    targets = [_state_of(flat, held.adam) for flat in held.flats]
    with torch.no_grad():
        for state in saved:
            for name, source in state["pieces"].items():
                if name in held.pieces:
                    piece, source = held.pieces[name], Piece(*source)
                    _copy(state["flats"][source.flat], source, targets[piece.flat], piece)
        for flat, target in zip(held.flats, targets, strict=True):
            held.adam.state[flat] = {key: target[key] for key in ("step", *MOMENTS)}
        _onto_weights(engine)
        buffers = dict(engine.module.named_buffers())
        for name, tensor in saved[min(dist.get_rank(), len(saved) - 1)]["buffers"].items():
            buffers[name].copy_(tensor)
    step = told["step"]
    continue_schedule(engine.lr_scheduler, step)
    engine.global_steps, engine.global_samples = step, step * engine.train_batch_size()
    engine.micro_steps = step * engine.gradient_accumulation_steps()


def learning_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Name and whole shape of each parameter that learns."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def hold(engine: Any) -> Held:
    """What this rank holds of an engine's optimizer, under every ZeRO stage and precision.

    Raises:
        ConfigError: it is on an NVMe disk.
    """
    optimizer, names = engine.optimizer, {p: name for name, p in engine.module.named_parameters()}
    adam = getattr(optimizer, "optimizer", optimizer)
    if engine.zero_optimization_stage() == 3:
        return _hold_shards(optimizer, adam, names)
    if engine.zero_optimization_stage() == 0:
        if optimizer is adam:
            parameters = flats = [p for group in adam.param_groups for p in group["params"]]
        else:  # in bf16, each with a copy in fp32
            parameters = [p for group in optimizer.fp16_groups for p in group]
            flats = [p for group in optimizer.fp32_groups for p in group]
        whole = {names[p]: Piece(flat, 0, 0, p.numel()) for flat, p in enumerate(parameters)}
        return Held(adam, flats, whole, is_copy=dist.get_rank() > 0)
    pieces = {}
    for parameter, name in names.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:  # with what lies on this rank
            ours, whole_address = mapping.hp_fragment_address, mapping.lp_fragment_address
            pieces[name] = Piece(
                mapping.param_group_index, ours.start, whole_address.start, whole_address.numel
            )
    # ZeRO-1 in bf16 with gradients in fp32 is another optimizer of DeepSpeed's.
    is_plain = hasattr(optimizer, "single_partition_of_fp32_groups")
    flats = optimizer.single_partition_of_fp32_groups if is_plain else optimizer.fp32_groups_flat_partition
    return Held(adam, flats, pieces)


def check_whole(saved: Sequence[Mapping[str, Any]], learning: Mapping[str, Sequence[int]]) -> None:
    """Refuse files that do not hold each element of each parameter once, as weight and as both moments.

    Args:
        saved: what the ranks' files hold.
        learning: names and shapes that they are to hold.

    Raises:
        WeightsError: names the first parameter that is not whole, or not known.
    """
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in learning}
    for state in saved:
        for name, fields in state["pieces"].items():
            if name not in spans:
                raise WeightsError(f"the checkpoint would hold {name}, which does not learn")
            piece, flat = Piece(*fields), state["flats"][fields[0]]
            for key in (WEIGHTS, *MOMENTS):
                if flat[key].numel() < piece.offset + piece.size:
                    raise WeightsError(f"the checkpoint would hold {name} without its {key}")
            spans[name].append((piece.start, piece.size))
    for name, shape in learning.items():
        reached = 0
        for start, count in sorted(spans[name]):
            if start != reached:
                break
            reached += count
        if reached != math.prod(shape):
            raise WeightsError(
                f"the checkpoint would hold {reached} of the {math.prod(shape)} elements of {name} in order"
            )


def _hold_shards(optimizer: Any, adam: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> Held:
    """ZeRO-3: each rank has as many elements of every parameter, the last ones padding."""
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise ConfigError(
            "what is offloaded to NVMe can be neither saved within a stage nor read back: offload to the CPU"
        )
    pieces, ranks = {}, set()
    for group in optimizer.fp16_groups:
        for parameter in group:
            flat, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            rank = optimizer._get_param_partition_rank(parameter)
            ranks.add(rank)
            count = min(size, parameter.ds_numel - rank * size)
            if count > 0:
                pieces[names[parameter]] = Piece(flat, offset, rank * size, count)
    # MiCS shards within groups of ranks that are copies of each other.
    return Held(adam, optimizer.fp32_partitioned_groups_flat, pieces, is_copy=ranks != {dist.get_rank()})


def _onto_weights(engine: Any) -> None:
    """Put the fp32 weights that this rank holds where the model computes with them."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer.checkpoint_event_prologue()
        flats = zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        )
        for weights, fp32 in flats:
            weights.data.copy_(fp32.data)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization_stage():
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for group, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, copy in zip(group, copies, strict=True):
                parameter.data.copy_(copy.data)


def _state_of(flat: Tensor, adam: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, moments and count of steps of one flat tensor; zeros before its first step."""
    state = adam.state.get(flat) or {}
    # A parameter that is not flattened may be a view of a mapped file, which would be written as a whole.
    is_view = isinstance(flat, nn.Parameter) and flat.untyped_storage().nbytes() > flat.nbytes
    return {
        WEIGHTS: flat.detach().clone() if is_view else flat.detach(),
        "step": state.get("step", torch.zeros((), dtype=torch.float32, device=flat.device)),
        **{key: state[key] if key in state else torch.zeros_like(flat.detach()) for key in MOMENTS},
    }


def _copy(source: Mapping[str, Tensor], there: Piece, target: Mapping[str, Tensor], here: Piece) -> None:
    """What two pieces of a parameter have in common, from one flat tensor to the other."""
    first = max(there.start, here.start)
    count = min(there.start + there.size, here.start + here.size) - first
    if count <= 0:
        return
    for key in (WEIGHTS, *MOMENTS):
        found = source[key].view(-1).narrow(0, there.offset + first - there.start, count)
        target[key].view(-1).narrow(0, here.offset + first - here.start, count).copy_(found)
    target["step"].copy_(source["step"])


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _read(checkpoint: Path) -> list[dict[str, Any]]:
    """What the ranks' files hold, in the order of ranks; tensors are mapped, and read when they are used."""
    count = len(list(checkpoint.glob("rank_*.pt")))
    return [
        torch.load(checkpoint / f"rank_{rank}.pt", map_location="cpu", mmap=True, weights_only=True)
        for rank in range(count)
    ]
