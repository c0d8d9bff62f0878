"""Scores of a dual encoder on held-out pictures: zero-shot classes, retrieval, linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import require
from vlm_vision.metrics import Classification, Retrieved, classification, retrieve
from vlm_vision.text_embeddings import TextCache, embed_classes, embed_texts
from vlm_vision.train.held_out import (
    LabelledPictures,
    Pictures,
    in_shares,
    mean_patches,
    open_captioned,
    open_labelled,
    picture_features,
)
from vlm_vision.train.linear_probe import linear_probe
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation_config import LinearProbeConfig, ValidationConfig, ZeroShotConfig

RECALL_AT = (1, 5, 10)


def validate_dual_encoder(
    model: DualEncoder,
    config: ValidationConfig,
    *,
    group: dist.ProcessGroup | None = None,
    cache: TextCache | None = None,
) -> dict[str, float]:
    """Every score that the config asks for, by name; leaves the model in the mode it was in.

    Args:
        group: ranks that share the work; each of them must call this, and gets the scores. No rank waits for
            more than another's share of pictures and texts; what follows (ranking, the probe's fit) each does
            itself, so that nothing long stands between two collectives. None scores in this process alone.
        cache: where embeddings of texts are kept, for a text tower that does not change; not with ranks.

    Raises:
        DataError: a held-out picture cannot be read: scores over fewer pictures would not compare.
        ConfigError: classes, templates or embeddings that cannot be.
    """
    evaluation = evaluate(model, config, group=group, cache=cache)
    return evaluation.scores


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification, picture by picture."""

    data: LabelledPictures
    found: Classification

    @property
    def scores(self) -> dict[str, float]:
        return _class_scores("zero_shot", self.found)


@dataclass(frozen=True)
class Retrieval:
    """Retrieval in both directions, query by query.

    Attributes:
        captions: of all pictures, one after another.
        owner: for each caption, its picture.
        images, texts: unit embeddings of pictures and captions.
    """

    pictures: Pictures
    captions: list[str]
    owner: Int[Tensor, " m"]
    images: Float[Tensor, "n e"]
    texts: Float[Tensor, "m e"]
    to_text: Retrieved
    to_image: Retrieved

    @property
    def scores(self) -> dict[str, float]:
        return {
            f"{direction}_r{k}": found.recall(k)
            for direction, found in (("image_to_text", self.to_text), ("text_to_image", self.to_image))
            for k in RECALL_AT
        }


@dataclass(frozen=True)
class Evaluation:
    """All that a `ValidationConfig` asks for."""

    zero_shot: ZeroShot | None
    retrieval: Retrieval | None
    probe: dict[str, float]

    @property
    def scores(self) -> dict[str, float]:
        parts = [part.scores for part in (self.zero_shot, self.retrieval) if part is not None]
        return {name: value for part in (*parts, self.probe) for name, value in part.items()}


def evaluate(
    model: DualEncoder,
    config: ValidationConfig,
    *,
    group: dist.ProcessGroup | None = None,
    cache: TextCache | None = None,
) -> Evaluation:
    """As `validate_dual_encoder`, with what was found for each picture and caption."""
    score = _Scorer(model, config, group, cache if group is None else None)
    with evaluating(model):
        return Evaluation(
            score.zero_shot(config.zero_shot) if config.zero_shot else None,
            score.retrieval(config.retrieval) if config.retrieval else None,
            score.probe(config.linear_probe) if config.linear_probe else {},
        )


def check_validation(config: ValidationConfig) -> None:
    """Open all held-out data, without their pictures: what is wrong shows before training, not after it.

    Raises:
        DataError, ConfigError: as `validate_dual_encoder`.
        MissingExtraError: the probe's library is not installed.
    """
    if config.zero_shot:
        open_labelled(config.zero_shot)
    if config.retrieval:
        open_captioned(config.retrieval)
    if config.linear_probe:
        require("train", "sklearn")
        open_probe(config.linear_probe)


def open_probe(config: LinearProbeConfig) -> tuple[LabelledPictures, LabelledPictures]:
    """Pictures to fit on and to score on, with the same classes."""
    train = open_labelled(config.train)
    return train, open_labelled(config.test, train.classes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; each module's own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class _Scorer:
    model: DualEncoder
    config: ValidationConfig
    group: dist.ProcessGroup | None
    cache: TextCache | None

    def zero_shot(self, config: ZeroShotConfig) -> ZeroShot:
        data = open_labelled(config)
        classes = in_shares(
            data.classes,
            lambda names: embed_classes(self.model, names, data.templates, cache=self.cache),
            self.model.logit_scale.device,
            self.group,
        )
        return ZeroShot(data, classification(self._embedded(data.pictures), classes, data.targets))

    def retrieval(self, config: PairsConfig) -> Retrieval:
        pictures = open_captioned(config)
        captions = [pictures.captions(index) for index in range(len(pictures))]
        owner = torch.tensor([index for index, own in enumerate(captions) for _ in own])
        texts = [caption for own in captions for caption in own]
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        embedded = in_shares(
            list(distinct),
            lambda some: embed_texts(self.model, some, cache=self.cache),
            self.model.logit_scale.device,
            self.group,
        )[[distinct[text] for text in texts]]
        images, numbers = self._embedded(pictures), torch.arange(len(pictures))
        return Retrieval(
            pictures,
            texts,
            owner,
            images,
            embedded,
            to_text=retrieve(images, numbers, embedded, owner),
            to_image=retrieve(embedded, owner, images, numbers),
        )

    def probe(self, config: LinearProbeConfig) -> dict[str, float]:
        train, test = open_probe(config)
        tower = self.model.tower
        features: dict[str, Callable[[Tensor], Tensor]] = {
            "pooled": tower.pooled,
            "patches": mean_patches(tower),
        }
        asked = ("pooled", "patches") if config.features == "both" else (config.features,)
        scores: dict[str, float] = {}
        for kind in asked:
            known, new = (self._features(data.pictures, features[kind]) for data in (train, test))
            found = linear_probe(known, train.targets, new, test.targets, len(train.classes))
            scores |= _class_scores("linear_probe" if kind == "pooled" else "linear_probe_patches", found)
        return scores

    def _embedded(self, pictures: Pictures) -> Float[Tensor, "n e"]:
        return normalize(self._features(pictures, self.model.tower.pooled), dim=-1)

    def _features(self, pictures: Pictures, features: Callable[[Tensor], Tensor]) -> Float[Tensor, "n d"]:
        return picture_features(
            self.model.tower,
            pictures,
            features,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            group=self.group,
        )


def _class_scores(name: str, found: Classification) -> dict[str, float]:
    scores = {f"{name}_top1": found.accuracy()}
    if len(found.confusion) > 5:  # of five classes, one is always among the five nearest
        scores[f"{name}_top5"] = found.accuracy(5)
    return {**scores, f"{name}_mean_per_class_recall": found.mean_per_class_recall}
