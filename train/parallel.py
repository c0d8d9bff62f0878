"""A model on one process or many: joined ranks, replicated (DDP) or split among them (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run.

    Attributes:
        joined: whether it joined their group here, and so has to leave it.
    """

    rank: int
    world: int
    device: torch.device
    joined: bool

    @classmethod
    def join(cls) -> Ranks:
        """Join the group that torchrun describes, if any, unless that is done."""
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        joins = world > 1 and not dist.is_initialized()
        if joins:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(rank, world, device, joins)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All of them; None for one process alone."""
        return dist.group.WORLD if self.world > 1 else None

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks; each of them must ask."""
        if self.world == 1:
            return items
        everyones: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(everyones, items)
        return [item for theirs in everyones for item in theirs]

    def leave(self) -> None:
        """Wait for the others, and leave the group if it was joined here."""
        if self.world > 1:
            dist.barrier()
        if self.joined:
            dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float], world: int, device: torch.device) -> list[float]:
    """Each value summed over ranks, in one exchange."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(numbers)
    return [float(number) for number in numbers]


class Parallel:
    """A module whose gradients are averaged over ranks.

    Attributes:
        module: called for its outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        kind: Literal["ddp", "fsdp"],
        world: int,
        blocks: Sequence[nn.Module] = (),
        loose: Sequence[nn.Parameter] = (),
    ) -> None:
        """Wrap a module, in place for FSDP2.

        Args:
            blocks: parts that FSDP2 gathers one after another.
            loose: numbers that FSDP2 cannot split.
        """
        self._bare, self._splits, self._world = module, kind == "fsdp" and world > 1, world
        self._loose, self._renewed = loose, dict[int, nn.Parameter]()
        self.module = module
        if self._splits:
            from torch.distributed.fsdp import fully_shard

            before = dict(module.named_parameters())
            for part in (*blocks, module):
                fully_shard(part, ignored_params=set(loose))
            after = dict(module.named_parameters())
            self._renewed = {id(parameter): after[name] for name, parameter in before.items()}
        elif world > 1:
            self.module = DistributedDataParallel(module)

    def renew(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Optimizer groups with the parameters that FSDP2 put in place of those it split.

        What is split and what is not come into groups of their own, since an optimizer takes a group at once.
        """
        renewed: list[dict[str, Any]] = []
        for group in groups:
            parameters = [self._renewed.get(id(parameter), parameter) for parameter in group["params"]]
            for is_split in (True, False):
                part = [parameter for parameter in parameters if isinstance(parameter, DTensor) == is_split]
                if part:
                    renewed.append({**group, "params": part})
        return renewed

    def finish_gradients(self) -> None:
        """Average what no wrapper did; to be called between backward and the optimizer."""
        if self._splits:
            for parameter in self._loose:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self._world

    @contextmanager
    def sync(self, is_last: bool) -> Iterator[None]:
        """Forward and backward within exchange gradients only if they are the last before a step."""
        if self._splits:
            self._bare.set_requires_gradient_sync(is_last)  # type: ignore[operator]
            yield
        elif isinstance(self.module, DistributedDataParallel) and not is_last:
            with self.module.no_sync():
                yield
        else:
            yield

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within, every rank has all parameters, and parts of the module can be called by themselves."""
        if not self._splits:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        parts = [part for part in self._bare.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.unshard()
            # Ranks run different numbers of batches here: none may wait for another to gather a block again.
            part.set_reshard_after_forward(False, recurse=False)
        yield
        for part in parts:
            part.set_reshard_after_forward(part is not self._bare, recurse=False)
            part.reshard()


def clip_gradients(parts: Mapping[str, Sequence[nn.Parameter]], largest: float) -> dict[str, float]:
    """Scale the gradients of all parts so that their common norm is at most `largest`.

    Returns:
        The norm that each part had, and `all`, that of all together.
    """
    norms: dict[str, Tensor] = {}
    everything: list[list[nn.Parameter]] = []
    for name, parameters in parts.items():
        # What FSDP2 split and what it did not are no tensors of one kind.
        kinds = [[p for p in parameters if isinstance(p, DTensor) == is_split] for is_split in (True, False)]
        everything += kinds
        found = [
            whole(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind
        ]
        norms[name] = torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros(())
    device = next(iter(norms.values())).device
    total = torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms.values()]))
    for parameters in filter(None, everything):
        clip_grads_with_norm_(parameters, largest, total)
    return {**{name: float(norm) for name, norm in norms.items()}, "all": float(total)}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be split among ranks; all of these must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Nested state of an optimizer with all tensors whole and on the CPU."""
    if isinstance(state, Tensor):
        return whole(state).cpu()
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole_state(value) for value in state]
    return state


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps of each parameter, by its name, whole and on the CPU.

    Groups are left out: how parameters are split among ranks decides on them, and rates come from the config.
    """
    return {name: whole_state(optimizer.state[parameter]) for name, parameter in named.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Any]],
) -> None:
    """Load what `optimizer_state` gave, each rank its part of what is split."""
    names = {id(parameter): name for name, parameter in named.items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        number: {
            key: fit(value, parameter)
            if isinstance(value, Tensor) and value.shape == parameter.shape
            else value
            for key, value in state[names[id(parameter)]].items()
        }
        for number, parameter in enumerate(parameters)
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": split})


def fit(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as a parameter of this shape is held: split where that is."""
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
