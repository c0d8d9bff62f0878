"""Zero-shot classification: pictures against the text embeddings of class names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.files import whole_folder
from vlm_vision.preprocess import Picture
from vlm_vision.progress import progress_bar
from vlm_vision.weights import read_state_dict

TEMPLATES = ("a photo of a {}.",)
CLASSES_FILE, EMBEDDINGS_FILE = "classes.json", "class_embeddings.safetensors"
TEXT_BATCH_SIZE = 256


class ZeroShotClassifier:
    """A dual encoder with the text embeddings of its classes computed once and kept.

    Attributes:
        classes: class names, in the order of the scores.
        templates: the texts that a class name is put into.
        class_embeddings: [C,E], unit length: the mean over templates of unit prompt embeddings, normalised
            again, as open_clip's `build_zero_shot_classifier` does.
    """

    def __init__(
        self,
        model: DualEncoder,
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        *,
        class_embeddings: Float[Tensor, "c e"] | None = None,
    ) -> None:
        """Embed every class under every template, unless the embeddings are given.

        Raises:
            ConfigError: no class, a class named twice, or a template without exactly one `{}`.
        """
        repeated = sorted({name for name in classes if list(classes).count(name) > 1})
        if not classes or repeated:
            found = f"{repeated} repeat" if repeated else "there are none"
            raise ConfigError(f"classes must be distinct names, but {found}")
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ConfigError(f"templates must each hold one {{}}, but {wrong or 'there are none'}")
        self.model, self.classes, self.templates = model, list(classes), list(templates)
        self.class_embeddings = self._embed() if class_embeddings is None else class_embeddings

    @torch.inference_mode()
    def _embed(self) -> Float[Tensor, "c e"]:
        prompts = [template.replace("{}", name) for name in self.classes for template in self.templates]
        embeddings = []
        with progress_bar(len(prompts), "embed classes", disable=len(prompts) <= TEXT_BATCH_SIZE) as bar:
            for start in range(0, len(prompts), TEXT_BATCH_SIZE):
                batch = prompts[start : start + TEXT_BATCH_SIZE]
                embeddings.append(self.model.encode_text(self.model.tokenizer(batch)))
                bar.update(len(batch))
        by_class = rearrange(torch.cat(embeddings), "(c t) e -> c t e", t=len(self.templates))
        return normalize(by_class.mean(dim=1), dim=-1)

    @torch.inference_mode()
    def logits(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Cosine similarities times the model's temperature factor."""
        images = self.model.encode_image(pixels)
        return self.model.logit_scale.exp() * images @ self.class_embeddings.to(images.device).T

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
