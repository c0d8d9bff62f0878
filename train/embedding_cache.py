"""Embeddings of a frozen tower, computed once: nothing random feeds it, so epochs do not change them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.train.contrastive_config import ContrastiveConfig


class EmbeddingCache:
    """Unit embeddings by the number of their sample; ranks share what each of them computed.

    Held on the CPU: 1 GiB takes about 350,000 embeddings of 768 numbers.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self._rows: dict[int, Tensor] = {}

    @classmethod
    def for_images(cls, model: DualEncoder, config: ContrastiveConfig, world: int) -> EmbeddingCache | None:
        """One for pictures, if their tower is frozen, they are cropped alike and nothing else reads them."""
        learns = any(parameter.requires_grad for parameter in model.tower.parameters())
        loss = config.loss
        others = loss.patch_weight or loss.caption_weight or loss.keep or config.patch_dropout
        if learns or others or not config.augment.is_fixed:
            return None
        return cls(world)

    def embed(
        self,
        numbers: Int[Tensor, " b"],
        inputs: Tensor,
        encode: Callable[[Tensor], Float[Tensor, "n e"]],
    ) -> Float[Tensor, "b e"]:
        """Embeddings of inputs, of which those whose number is new are encoded."""
        new = [place for place, number in enumerate(numbers.tolist()) if number not in self._rows]
        with torch.no_grad():
            found = encode(inputs[new]).cpu() if new else None
        if found is not None:
            for place, row in zip(new, found, strict=True):
                self._rows[int(numbers[place])] = row
        embeddings = torch.stack([self._rows[number] for number in numbers.tolist()])
        if self._world > 1:
            self._share(numbers, embeddings)
        return embeddings.to(inputs.device)

    def _share(self, numbers: Tensor, embeddings: Tensor) -> None:
        """Another rank may see these samples in the next epoch."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        everyones: list[list[Tensor]] = []
        for tensor in (numbers.to(device), embeddings.to(device)):
            everyones.append([torch.empty_like(tensor) for _ in range(self._world)])
            dist.all_gather(everyones[-1], tensor.contiguous())
        for theirs, rows in zip(*everyones, strict=True):
            for number, row in zip(theirs.tolist(), rows.cpu(), strict=True):
                self._rows.setdefault(number, row)
