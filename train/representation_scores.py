"""Scores of the representation stage on held-out pictures: retrieval by ITC and by ITM, and ITM alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm_vision.errors import DataError
from vlm_vision.tower import VisionTower
from vlm_vision.train.held_out import in_shares, open_captioned, picture_features
from vlm_vision.train.representation import RepresentationModel, similarities
from vlm_vision.train.representation_config import RepresentationValidationConfig
from vlm_vision.train.representation_objective import gumbel_noise
from vlm_vision.train.validation import RECALL_AT, evaluating


@torch.inference_mode()
def validate_representation(
    model: RepresentationModel,
    tower: VisionTower,
    config: RepresentationValidationConfig,
    *,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Scores by name; nothing where the config asks for none. Leaves the model in the mode it was in.

    `image_to_text_r1` and the like are recalls by ITC. With `rerank` k, `_itm` after them: the k nearest by
    ITC are ordered by the logit of a match plus the similarity, as LAVIS does (`blip2.py`,
    `compute_sim_matrix`). `itm_accuracy` is that of the training task: of each picture with its own caption,
    with one that does not fit, and of the caption with a picture that does not, the share told right; 2/3 is
    what saying no to all gives.

    Args:
        group: ranks that share the work; each of them must call this, and gets the scores.

    Raises:
        DataError: a held-out picture cannot be read: scores over fewer pictures would not compare.
    """
    if config.retrieval is None:
        return {}
    pictures = open_captioned(config.retrieval)
    captions = [pictures.captions(index) for index in range(len(pictures))]
    with evaluating(model):
        patches = picture_features(
            tower,
            pictures,
            lambda pixels: rearrange(tower(pixels), "b n d -> b (n d)"),
            batch_size=config.batch_size,
            workers=config.workers,
            group=group,
        )
        patches = rearrange(patches, "b (n d) -> b n d", d=tower.hidden_size)
        return _Scorer(model, patches, captions, config, group).scores()


def recalls(scores: Float[Tensor, "q g"], is_true: Bool[Tensor, "q g"], name: str) -> dict[str, float]:
    """Share of queries with a true item among the k that score highest; a tie with a wrong one is lost."""
    own = scores.masked_fill(~is_true, -torch.inf).amax(dim=1, keepdim=True)
    ranks = ((scores >= own) & ~is_true).sum(dim=1)
    return {name.format(k): float((ranks < k).double().mean()) for k in RECALL_AT}


@dataclass(frozen=True)
class _Scorer:
    model: RepresentationModel
    patches: Float[Tensor, "n p d"]
    captions: Sequence[Sequence[str]]
    config: RepresentationValidationConfig
    group: dist.ProcessGroup | None

    def scores(self) -> dict[str, float]:
        texts = [caption for own in self.captions for caption in own]
        ids = self.model.tokenizer(texts)
        owner = torch.tensor([index for index, own in enumerate(self.captions) for _ in own])
        is_own = torch.arange(len(self.captions))[:, None] == owner
        itc = self._similarities(ids)
        ways = [("image_to_text_r{}", itc, is_own, False), ("text_to_image_r{}", itc.T, is_own.T, True)]
        found: dict[str, float] = {}
        for name, similarity, is_true, by_text in ways:
            found |= recalls(similarity, is_true, name)
            if self.config.rerank:
                found |= recalls(self._reranked(similarity, ids, by_text), is_true, f"{name}_itm")
        firsts = (owner[:, None] == torch.arange(len(self.captions))).int().argmax(dim=0)
        return {**found, "itm_accuracy": self._itm_accuracy(itc[:, firsts], ids[firsts])}

    def _similarities(self, ids: Int[Tensor, "m t"]) -> Float[Tensor, "n m"]:
        """Of all pictures and texts, not scaled."""
        model = self.model
        images = self._in_batches(
            len(self.patches),
            lambda rows: model.embed_queries(model.queries(self.patches[rows].to(self._device))),
        )
        texts = self._in_batches(len(ids), lambda rows: model.embed_texts(ids[rows].to(self._device)))
        return torch.cat([similarities(part, texts) for part in torch.split(images, self.config.batch_size)])

    def _reranked(
        self, similarity: Float[Tensor, "q g"], ids: Int[Tensor, "m t"], by_text: bool
    ) -> Float[Tensor, "q g"]:
        """Scores of the nearest of each query, and -inf for the rest."""
        best, nearest = similarity.topk(min(self.config.rerank, similarity.shape[1]), dim=1)
        query = torch.arange(len(nearest)).repeat_interleave(nearest.shape[1])
        pictures, texts = (nearest.flatten(), query) if by_text else (query, nearest.flatten())
        logits = self._match(pictures, ids[texts])[:, 1]
        return torch.full_like(similarity, -torch.inf).scatter(1, nearest, best + logits.view_as(best))

    def _itm_accuracy(self, itc: Float[Tensor, "n n"], ids: Int[Tensor, "n t"]) -> float:
        """Pairs that fit and, drawn as in training, twice as many that do not."""
        is_same = (ids[:, None] == ids).all(dim=2)
        if bool(is_same.all(dim=1).any()):
            raise DataError(
                "the held-out captions all say the same as one of them: ITM has none that is wrong"
            )
        scale = float(self.model.logit_scale.exp())
        wrong_text, wrong_picture = (
            (scores.masked_fill(is_same, -torch.inf) + gumbel).argmax(dim=1)
            for scores, gumbel in zip(
                (scale * itc, scale * itc.T), gumbel_noise(len(ids), seed=0, step=0), strict=True
            )
        )
        own = torch.arange(len(ids))
        logits = self._match(torch.cat([own, own, wrong_picture]), torch.cat([ids, ids[wrong_text], ids]))
        is_match = torch.arange(len(logits)) < len(ids)
        return float(((logits[:, 1] > logits[:, 0]) == is_match).double().mean())

    def _match(self, pictures: Int[Tensor, " p"], ids: Int[Tensor, "p t"]) -> Float[Tensor, "p 2"]:
        """Logits of ITM for pairs of a picture's number and a text."""
        return self._in_batches(
            len(ids),
            lambda rows: self.model.match(
                self.patches[pictures[rows]].to(self._device), ids[rows].to(self._device)
            ),
        )

    def _in_batches(self, count: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Rows 0 to count, of which each rank computes its share, batch by batch."""
        size = self.config.batch_size

        def share(rows: list[int]) -> Tensor:
            return torch.cat(
                [compute(rows[first : first + size]).float() for first in range(0, len(rows), size)]
            )

        return in_shares(range(count), share, self._device, self.group)

    @property
    def _device(self) -> torch.device:
        return self.model.query_tokens.device
