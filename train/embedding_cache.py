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
    """What a frozen tower gives, by the number of the sample; ranks share their own.

    Held on the CPU: 1 GiB takes about 250,000 rows of 1,024 numbers.

    Args:
        features: of pixels [b,3,h,w], a tensor of each picture.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], world: int) -> None:
        self._features, self._world = features, world
        self._rows: dict[int, Tensor] = {}

    @classmethod
    def for_images(cls, model: DualEncoder, config: ContrastiveConfig, world: int) -> EmbeddingCache | None:
        """What the tower pools before its projection, if nothing else learns in it, pictures are cropped
        alike, and no other part of the loss reads them.
        """
        backbone = model.tower.backbone
        learning = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        loss = config.loss_of_run()
        others = loss.patch_weight or loss.caption_weight or loss.keep or config.patch_dropout
        is_split = config.parallel == "fsdp" and world > 1  # then parts cannot be called by themselves
        if learning - set(backbone.projection) or others or is_split or not config.augment.is_fixed:
            return None
        return cls(backbone.pooled_features, world)

    def embed(
        self,
        numbers: Int[Tensor, " b"],
        pixels: Float[Tensor, "b 3 h w"],
    ) -> Float[Tensor, "b ..."]:
        """Features of pictures, of which those whose number is new go through the tower."""
        new = [place for place, number in enumerate(numbers.tolist()) if number not in self._rows]
        if new:
            with torch.no_grad():
                found = self._features(pixels[new]).float().cpu()
            for place, row in zip(new, found, strict=True):
                self._rows[int(numbers[place])] = row
        embeddings = torch.stack([self._rows[number] for number in numbers.tolist()])
        if self._world > 1:
            self._share(numbers, embeddings)
        return embeddings.to(pixels.device)

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
