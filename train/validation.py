"""Scores of a dual encoder on held-out pictures: zero-shot accuracy and retrieval."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.metrics import recall_at_k, top1_accuracy
from vlm_vision.progress import progress_bar
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.validation_config import ValidationConfig
from vlm_vision.zero_shot import ZeroShotClassifier

BATCH_SIZE = 128


def validate_dual_encoder(model: DualEncoder, config: ValidationConfig) -> dict[str, float]:
    """Every score that the config asks for, by name; leaves the model in the mode it was in.

    Raises:
        DataError: a held-out picture cannot be read: scores over fewer pictures would not compare.
    """
    was_training = model.training
    model.eval()
    scores: dict[str, float] = {}
    if config.zero_shot:
        scores["zero_shot_top1"] = zero_shot_top1(model, config.zero_shot)
    if config.retrieval:
        scores |= retrieval(model, config.retrieval)
    model.train(was_training)
    return scores


def zero_shot_top1(model: DualEncoder, data: PairsConfig) -> float:
    """Share of pictures whose class, of all classes in the data, has the nearest text embedding."""
    pairs = Pairs(data)
    labels = [pairs.captions(index)[0] for index in range(len(pairs))]
    classes = sorted(set(labels))
    classifier = ZeroShotClassifier(model, classes, data.templates)
    logits = embed_pictures(model, pairs) @ classifier.class_embeddings.T.cpu()
    return top1_accuracy(logits, torch.tensor([classes.index(label) for label in labels]))


def retrieval(model: DualEncoder, data: PairsConfig) -> dict[str, float]:
    """Recall at 1 and 5 in both directions; any of a picture's captions counts as its own."""
    pairs = Pairs(data)
    captions = [caption for index in range(len(pairs)) for caption in pairs.captions(index)]
    owner = torch.tensor([index for index in range(len(pairs)) for _ in pairs.captions(index)])
    images, texts = embed_pictures(model, pairs), embed_texts(model, captions)
    own_captions = [torch.nonzero(owner == index).flatten().tolist() for index in range(len(pairs))]
    own_pictures = [[int(index)] for index in owner]
    similarity = images @ texts.T
    return {
        f"{direction}_r{k}": recall_at_k(scores, positives, k)
        for direction, scores, positives in (
            ("image_to_text", similarity, own_captions),
            ("text_to_image", similarity.T, own_pictures),
        )
        for k in (1, 5)
    }


@torch.inference_mode()
def embed_pictures(model: DualEncoder, pairs: Pairs) -> Float[Tensor, "n e"]:
    """Image embeddings of every picture, in order, on the CPU."""
    processor, embeddings = model.image_processor, []
    with progress_bar(len(pairs), "embed pictures") as bar:
        for start in range(0, len(pairs), BATCH_SIZE):
            stop = min(start + BATCH_SIZE, len(pairs))
            squares = [processor.to_square(pairs.open(index)) for index in range(start, stop)]
            embeddings.append(model.encode_image(processor.normalise(squares)).float().cpu())
            bar.update(stop - start)
    return torch.cat(embeddings)


@torch.inference_mode()
def embed_texts(model: DualEncoder, texts: list[str]) -> Float[Tensor, "n e"]:
    """Text embeddings, in order, on the CPU."""
    parts = [
        model.encode_text(model.tokenizer(texts[start : start + BATCH_SIZE])).float().cpu()
        for start in range(0, len(texts), BATCH_SIZE)
    ]
    return torch.cat(parts)
