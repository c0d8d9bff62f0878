"""Zero-shot classification: pictures against the text embeddings of class names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.preprocess import Picture


class ZeroShotClassifier:
    """A dual encoder with the text embeddings of its classes computed once and kept.

    Attributes:
        classes: class names, in the order of the scores.
        class_embeddings: [C,E], unit length: the mean over templates of unit-length prompt embeddings, normalised
            again, as open_clip's `build_zero_shot_classifier` does.
    """

    def __init__(
        self, model: DualEncoder, classes: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
    ) -> None:
        """Embed every class under every template.

        Raises:
            ConfigError: no class, a class named twice, or a template without exactly one `{}`.
        """
        repeated = sorted({name for name in classes if list(classes).count(name) > 1})
        if not classes or repeated:
            raise ConfigError(
                f"classes must be distinct names, but {f'{repeated} repeat' if repeated else 'there are none'}"
            )
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ConfigError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        self.model, self.classes = model, list(classes)
        self.class_embeddings = self._embed(templates)

    @torch.inference_mode()
    def _embed(self, templates: Sequence[str]) -> Float[Tensor, "c e"]:
        tokenizer, count = self.model.tokenizer, len(templates)
        per_class = [
            self.model.encode_text(tokenizer([template.replace("{}", name) for template in templates]))
            for name in self.classes
        ]
        prompts = rearrange(torch.cat(per_class), "(c t) e -> c t e", t=count)
        return normalize(prompts.mean(dim=1), dim=-1)

    @torch.inference_mode()
    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Cosine similarities times the model's temperature factor."""
        return self.model.logit_scale.exp() * self.model.encode_image(pixels) @ self.class_embeddings.T

    def classify(self, pictures: Sequence[Picture], top_k: int = 1) -> list[list[tuple[str, float]]]:
        """The `top_k` classes of each picture with their probabilities, best first.

        Raises:
            DataError: a picture cannot be read.
        """
        probabilities = self.logits(self.model.image_processor(list(pictures))).softmax(dim=-1).cpu()
        best = probabilities.topk(min(top_k, len(self.classes)), dim=-1)
        return [
            [(self.classes[index], score) for index, score in zip(indices, scores, strict=True)]
            for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
