"""Zero-shot classification: pictures against the text embeddings of class names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.files import whole_folder
from vlm_vision.preprocess import Picture
from vlm_vision.progress import progress_bar
from vlm_vision.prompts import CLASSES, read_classes, read_templates
from vlm_vision.text_embeddings import TextCache, embed_classes
from vlm_vision.weights import read_state_dict

TEMPLATES = ("a photo of a {}.",)
CLASSES_FILE, EMBEDDINGS_FILE = "classes.json", "class_embeddings.safetensors"


class ZeroShotClassifier:
    """A dual encoder with the text embeddings of its classes computed once and kept.

    Attributes:
        classes: class names, in the order of the scores.
        templates: the texts that a class name is put into.
        class_embeddings: [C,E], unit length; see `embed_classes`.
    """

    def __init__(
        self,
        model: DualEncoder,
        classes: str | Sequence[str],
        templates: str | Sequence[str] = TEMPLATES,
        *,
        class_embeddings: Float[Tensor, "c e"] | None = None,
        cache: TextCache | None = None,
    ) -> None:
        """Embed every class under every template, unless the embeddings are given.

        Args:
            classes: names, a file with one a line, or the name of a list; see `prompts.read_classes`.
            templates: texts with `{}`, a file with one a line, or `openai_80`, `openai_7`.
            cache: where embeddings are kept; `TextCache.of_user()` is the user's own.

        Raises:
            ConfigError: no class, a class named twice, or a template without exactly one `{}`.
        """
        self.model, self.classes, self.templates = model, read_classes(classes), read_templates(templates)
        if isinstance(classes, str) and classes in CLASSES:  # answers are names, so one of each is enough
            self.classes = list(dict.fromkeys(self.classes))
        repeated = sorted(name for name, count in Counter(self.classes).items() if count > 1)
        if repeated:
            raise ConfigError(f"classes must be distinct names, but {repeated} repeat")
        if class_embeddings is None:
            class_embeddings = embed_classes(model, self.classes, self.templates, cache=cache)
        self.class_embeddings = class_embeddings

    @torch.inference_mode()
    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Cosine similarities times the model's temperature factor."""
        images = self.model.encode_image(pixels)
        return self.model.logit_scale.exp() * images @ self.class_embeddings.to(images).T

    def classify(
        self, pictures: Sequence[Picture], top_k: int = 1, *, batch_size: int = 64
    ) -> list[list[tuple[str, float]]]:
        """The `top_k` classes of each picture with their probabilities, best first.

        Raises:
            DataError: a picture cannot be read.
        """
        found = []
        with progress_bar(len(pictures), "classify", disable=len(pictures) <= batch_size) as bar:
            for start in range(0, len(pictures), batch_size):
                batch = pictures[start : start + batch_size]
                probabilities = self.logits(self.model.image_processor(batch)).float().softmax(dim=-1).cpu()
                best = probabilities.topk(min(top_k, len(self.classes)), dim=-1)
                found += [
                    [(self.classes[index], score) for index, score in zip(indices, scores, strict=True)]
                    for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
                bar.update(len(batch))
        return found

    def save(self, folder: str | Path) -> None:
        """Write class names, templates and embeddings, so that no text need be embedded again."""
        content = {
            "model": self.model.fingerprint(),
            "classes": self.classes,
            "templates": self.templates,
        }
        with whole_folder(folder) as partial:
            save_file(
                {"class_embeddings": self.class_embeddings.cpu().contiguous()}, partial / EMBEDDINGS_FILE
            )
            (partial / CLASSES_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: DualEncoder) -> ZeroShotClassifier:
        """Read what `save` wrote.

        Raises:
            ConfigError: the folder holds no classes, or another model embedded them.
            WeightsError: the embeddings are damaged.
        """
        path = Path(folder) / CLASSES_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            made_by, classes, templates = content["model"], content["classes"], content["templates"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder} holds no embedded classes: {error!r}") from error
        if made_by != model.fingerprint():
            raise ConfigError(f"{folder}: these classes were embedded by another model: embed them again")
        embeddings = read_state_dict(Path(folder) / EMBEDDINGS_FILE)["class_embeddings"]
        return cls(model, classes, templates, class_embeddings=embeddings)
