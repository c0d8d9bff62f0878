"""Embeddings of texts and of classes by their prompts, kept on disk by what they were computed from."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor
from torch.nn.functional import normalize

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.files import whole_file
from vlm_vision.progress import progress_bar
from vlm_vision.weights import fingerprint

TEXT_BATCH_SIZE = 256
CACHE_VARIABLE, OFF = "VLM_VISION_CACHE", "off"
CACHE_BYTES = 2**30
_STALE = 24 * 3600  # seconds after which a half-written file is what a killed process left


class TextCache:
    """Embeddings in files named by a hash of all that they were computed from.

    So nothing in it is ever out of date. Files are complete or absent, several processes may share a folder,
    and once its files hold more than `max_bytes`, those used longest ago go.

    Args:
        folder: made if absent.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ConfigError(
                f"the cache of text embeddings cannot be written to {self.folder}: set {CACHE_VARIABLE} to "
                f"another folder, or to {OFF!r}"
            )

    @classmethod
    def of_user(cls) -> TextCache | None:
        """The one in the user's cache folder, or where `VLM_VISION_CACHE` says; None where that is `off`."""
        said = os.environ.get(CACHE_VARIABLE)
        if said == OFF:
            return None
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(said) if said else Path(home) / "vlm_vision" / "texts")

    def read(self, key: str) -> Tensor | None:
        """What was written under a key; None where nothing was, or the file is damaged."""
        path = self._path(key)
        try:
            found: Tensor = load(path.read_bytes())["embeddings"]  # `load_file` opens it twice
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        with suppress(FileNotFoundError):  # another process may have just removed it
            os.utime(path)
        return found

    def write(self, key: str, embeddings: Float[Tensor, "n e"]) -> None:
        """Keep embeddings; where the disk is full, say so and go on without."""
        try:
            with whole_file(self._path(key)) as partial:
                save_file({"embeddings": embeddings.contiguous()}, partial)
            self.prune()
        except (OSError, SafetensorError) as error:
            print(f"text embeddings are not kept in {self.folder}: {error}", file=sys.stderr)

    def prune(self) -> None:
        """Remove files, those used longest ago first, until the rest fits; and what killed processes left."""
        now = time.time()
        files = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".partial" and now - status.st_mtime > _STALE:
                path.unlink(missing_ok=True)
            elif path.suffix == ".safetensors":
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self.max_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def embed_texts(
    model: DualEncoder, texts: Sequence[str], *, cache: TextCache | None = None
) -> Float[Tensor, "n e"]:
    """Unit embeddings, fp32, on the CPU. Texts that repeat are embedded once, so theirs are equal."""
    distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    embeddings = _embed(model, list(distinct), 1, cache)
    return embeddings[[distinct[text] for text in texts]]


def embed_classes(
    model: DualEncoder, classes: Sequence[str], templates: Sequence[str], *, cache: TextCache | None = None
) -> Float[Tensor, "c e"]:
    """Unit embeddings of classes, fp32, on the CPU.

    The mean over templates of unit prompt embeddings, normalised again, as open_clip's
    `build_zero_shot_classifier` computes it.

    Args:
        templates: each with one `{}` for the class name.
    """
    distinct = {name: number for number, name in enumerate(dict.fromkeys(classes))}
    prompts = [template.replace("{}", name) for name in distinct for template in templates]
    embeddings = _embed(model, prompts, len(templates), cache)
    return embeddings[[distinct[name] for name in classes]]


@torch.inference_mode()
def _embed(
    model: DualEncoder, texts: Sequence[str], per_class: int, cache: TextCache | None
) -> Float[Tensor, "c e"]:
    tokens = torch.cat([model.tokenizer(texts[start:stop]) for start, stop in _batches(len(texts))])
    key = "" if cache is None else _key(model, tokens, per_class)
    kept = None if cache is None else cache.read(key)
    if kept is not None:
        return kept
    parts = []
    with progress_bar(len(texts), "embed texts", disable=len(texts) <= TEXT_BATCH_SIZE) as bar:
        for start, stop in _batches(len(texts)):
            parts.append(model.encode_text(tokens[start:stop]).float().cpu())
            bar.update(stop - start)
    embeddings = torch.cat(parts)
    if per_class > 1:
        by_class = rearrange(embeddings, "(c t) e -> c t e", t=per_class)
        embeddings = normalize(by_class.mean(dim=1), dim=-1)
    if cache is not None:
        cache.write(key, embeddings)
    return embeddings


def _key(model: DualEncoder, tokens: Int[Tensor, "n t"], per_class: int) -> str:
    """A hash of the text tower's weights and architecture, of its device, and of token ids, which say
    tokenizer, context length and texts at once."""
    backbone = model.tower.backbone.portable_config().model_dump(mode="json", exclude={"weights"})
    settings = [backbone, model.logit_scale.device.type, per_class, list(tokens.shape)]
    digest = sha256(fingerprint(model.text, json.dumps(settings, sort_keys=True)).encode())
    digest.update(tokens.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _batches(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + TEXT_BATCH_SIZE, size)) for start in range(0, size, TEXT_BATCH_SIZE)]
