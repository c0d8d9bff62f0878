"""An exact visual index: pictures found by text or by picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.files import whole_folder
from vlm_vision.preprocess import find_pictures, open_image
from vlm_vision.progress import progress_bar
from vlm_vision.weights import read_state_dict

INDEX_FILE, PATHS_FILE, EMBEDDINGS_FILE = "index.json", "paths.jsonl", "embeddings.safetensors"
INDEX_TYPE = "vlm_vision_visual_index"


@dataclass(frozen=True)
class Hit:
    """A picture that was found, with its cosine similarity to the query."""

    path: str
    score: float


class VisualIndex:
    """Unit embeddings of pictures, searched exactly.

    Attributes:
        model: embeds the queries; the one that embedded the pictures.
        paths: of the pictures, in the order of their embeddings.
        embeddings: [N,E], fp32, on the CPU.
        bad: pictures that could not be read and were left out, with the reason.
    """

    def __init__(
        self,
        model: DualEncoder,
        paths: Sequence[str],
        embeddings: Float[Tensor, "n e"],
        bad: Sequence[str] = (),
    ) -> None:
        self.model, self.paths, self.embeddings, self.bad = model, list(paths), embeddings, list(bad)

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        model: DualEncoder,
        pictures: str | Path | Sequence[str | Path],
        *,
        batch_size: int = 64,
        max_bad_share: float = 0.05,
    ) -> VisualIndex:
        """Embed pictures.

        Args:
            pictures: a folder, searched with its subfolders, or paths.
            max_bad_share: pictures that cannot be read are left out, counted and listed up to this share.

        Raises:
            DataError: no picture, or more that cannot be read than `max_bad_share`.
        """
        if isinstance(pictures, (str, Path)):
            paths = find_pictures(Path(pictures))
        else:
            paths = [Path(path) for path in pictures]
        if not paths:
            raise DataError("no picture was given")
        kept, embeddings, bad = [], [], []
        with progress_bar(len(paths), "embed pictures") as bar:
            for start in range(0, len(paths), batch_size):
                squares = []
                for path in paths[start : start + batch_size]:
                    try:
                        squares.append(model.image_processor.to_square(open_image(path)))
                        kept.append(str(path))
                    except DataError as error:
                        bad.append(str(error))
                if len(bad) > max_bad_share * len(paths):
                    raise DataError(
                        f"{len(bad)} of {len(paths)} pictures cannot be read, more than max_bad_share "
                        f"{max_bad_share}; the last: {bad[-1]}"
                    )
                if squares:
                    pixels = model.image_processor.normalise(squares)
                    embeddings.append(model.encode_image(pixels).float().cpu())
                bar.update(min(batch_size, len(paths) - start))
        return cls(model, kept, torch.cat(embeddings), bad)

    def search(self, query: str | Path | Image.Image, top_k: int = 10) -> list[Hit]:
        """The pictures nearest to a text (a string) or to a picture (a path or an image), best first.

        Raises:
            DataError: an empty text, or a picture that cannot be read.
        """
        if isinstance(query, str) and not query.strip():
            raise DataError("the query is empty: type what to look for")
        with torch.inference_mode():
            if isinstance(query, str):
                embedding = self.model.encode_text(self.model.tokenizer(query))
            else:
                embedding = self.model.encode_image(self.model.image_processor(query))
        scores, indices = self.nearest(embedding, top_k)
        return [
            Hit(self.paths[index], score)
            for index, score in zip(indices[0].tolist(), scores[0].tolist(), strict=True)
        ]

    def nearest(
        self, queries: Float[Tensor, "q e"], top_k: int, *, chunk: int = 65_536
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Scores and indices of the largest inner products, best first; `chunk` pictures at a time."""
        queries = queries.float().cpu()
        scores = torch.empty(len(queries), 0)
        indices = torch.empty(len(queries), 0, dtype=torch.long)
        for start in range(0, len(self.embeddings), chunk):
            products = queries @ self.embeddings[start : start + chunk].T
            numbers = torch.arange(start, start + products.shape[1]).expand_as(products)
            scores, indices = torch.cat([scores, products], dim=1), torch.cat([indices, numbers], dim=1)
            scores, best = scores.topk(min(top_k, scores.shape[1]), dim=1)
            indices = indices.gather(1, best)
        return scores, indices

    def save(self, folder: str | Path) -> None:
        """Write embeddings, paths and the fingerprint of the model; complete or absent."""
        content = {"type": INDEX_TYPE, "model": self.model.fingerprint(), "bad": self.bad}
        with whole_folder(folder) as partial:
            save_file({"embeddings": self.embeddings.contiguous()}, partial / EMBEDDINGS_FILE)
            lines = (json.dumps({"path": path}) + "\n" for path in self.paths)
            (partial / PATHS_FILE).write_text("".join(lines), encoding="utf-8")
            (partial / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, model: DualEncoder) -> VisualIndex:
        """Read what `save` wrote.

        Raises:
            ConfigError: the folder is no index, or another model made it.
            WeightsError: its embeddings are damaged.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            lines = (folder / PATHS_FILE).read_text(encoding="utf-8").splitlines()
            paths = [json.loads(line)["path"] for line in lines]
            made_by, bad = content["model"], content["bad"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} is no visual index ({error!r}): make one with `vlm-vision index`"
            ) from error
        if made_by != model.fingerprint():
            raise ConfigError(
                f"{folder} was made by another model, so its scores would mean nothing: index again"
            )
        return cls(model, paths, read_state_dict(folder / EMBEDDINGS_FILE)["embeddings"], bad)

    def export_faiss(self, path: str | Path) -> None:
        """Write a faiss `IndexFlatIP` over the same embeddings; row i is `paths[i]`.

        Raises:
            MissingExtraError: faiss is not installed.
        """
        require("search", "faiss")
        import faiss

        index = faiss.IndexFlatIP(self.embeddings.shape[1])
        index.add(self.embeddings.numpy())
        faiss.write_index(index, str(path))

    def __len__(self) -> int:
        return len(self.paths)
