"""Image and text towers in one embedding space. Its tower is the tower that alignment loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from vlm_vision.compat import attention_kernel
from vlm_vision.errors import ConfigError
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.text import TextSide, Tokenizer
from vlm_vision.tower import (
    DUAL_ENCODER_TYPE,
    TOKENIZER_FOLDER,
    Source,
    VisionTower,
    describe_tower,
    read_folder,
    resolve_folder,
    save_folder,
    saved_folder,
    tower_config,
)
from vlm_vision.tower_config import BackboneConfig, TowerConfig
from vlm_vision.weights import fingerprint, load_strict, without_init


class DualEncoder(nn.Module):
    """A vision tower with its pooled head beside the text tower it was trained with.

    Attributes:
        tower: gives patch features as ever, and through `tower.pooled` what image embeddings are made of.
        image_projection: from there to image embeddings, in models of transformers that have one; open_clip's
            have it in their towers.
        text: token ids [B,T] to embeddings [B,E]; in a CoCa to them and the tokens' states.
        text_decoder: CoCa's captioning head (arXiv:2205.01917), or None.
        logit_scale: log of the factor on cosine similarities (CLIP, arXiv:2103.00020, section 2.5).
        logit_bias: what is added to them then (SigLIP, arXiv:2303.15343, section 3.2); None in a CLIP.
        tokenizer: captions to token ids.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, tower: VisionTower, text: TextSide) -> None:
        super().__init__()
        if not tower.config.pooled_head:
            raise ConfigError("a dual encoder needs a tower with pooled_head=True")
        self.tower = tower
        self.image_projection = text.image_projection and text.image_projection.to(tower.dtype)
        self.text = text.encoder.to(tower.dtype)
        self.text_decoder = text.text_decoder and text.text_decoder.to(tower.dtype)
        self.tokenizer: Tokenizer = text.tokenizer
        self.logit_scale = nn.Parameter(torch.tensor(text.logit_scale))
        bias = None if text.logit_bias is None else nn.Parameter(torch.tensor(text.logit_bias))
        self.register_parameter("logit_bias", bias)
        self._fields = text.fields

    @property
    def config(self) -> TowerConfig:
        return self.tower.config

    @property
    def image_processor(self) -> ImageProcessor:
        return self.tower.image_processor

    def encode_image(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Unit-length image embeddings."""
        return normalize(self.project_image(self.tower.pooled(pixels)), dim=-1)

    def project_image(self, pooled: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """From what the tower pools to image embeddings, not normalised."""
        embeddings: Tensor = pooled if self.image_projection is None else self.image_projection(pooled)
        return embeddings

    def encode_text(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Unit-length text embeddings."""
        output = self.text(tokens.to(self.logit_scale.device))
        return normalize(output if isinstance(output, Tensor) else output[0], dim=-1)

    def encode_image_with_tokens(
        self, pixels: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b m d"]]:
        """Unit-length image embeddings, and of the same forward the tokens that the decoder looks at.

        Raises:
            ConfigError: the model has no decoder.
        """
        self._check_decoder()
        backbone: Any = self.tower.backbone
        with attention_kernel(self.config.attention):
            pooled, tokens = backbone.pooled_with_tokens(self.tower.check_pixels(pixels, False))
        return normalize(pooled, dim=-1), tokens

    def encode_text_with_tokens(
        self, tokens: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "b t d"]]:
        """Unit-length text embeddings, and of the same forward the tokens' states that the decoder goes on.

        Raises:
            ConfigError: the model has no decoder.
        """
        self._check_decoder()
        embeddings, states = self.text(tokens.to(self.logit_scale.device))
        return normalize(embeddings, dim=-1), states

    def decode(
        self, image_tokens: Float[Tensor, "b m d"], text_states: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token after each, given the picture; `caption_loss` makes a loss of them.

        Raises:
            ConfigError: the model has no decoder.
        """
        logits: Tensor = self._check_decoder()(image_tokens, text_states)
        return logits

    def caption_logits(
        self, pixels: Float[Tensor, "b 3 h w"], tokens: Int[Tensor, "b t"]
    ) -> Float[Tensor, "b t v"]:
        """Logits of the token after each of a caption's, as `forward` of open_clip's CoCa gives them.

        Raises:
            ConfigError: the model has no decoder.
        """
        return self.decode(self.encode_image_with_tokens(pixels)[1], self.encode_text_with_tokens(tokens)[1])

    def _check_decoder(self) -> nn.Module:
        if self.text_decoder is None:
            raise ConfigError(
                "this dual encoder has no decoder, which captions need: use a CoCa, e.g. "
                "open_clip:coca_ViT-B-32@laion2b_s13b_b90k"
            )
        return self.text_decoder

    def forward(
        self, pixels: Float[Tensor, "b 3 h w"], tokens: Int[Tensor, "c t"]
    ) -> tuple[Float[Tensor, "b e"], Float[Tensor, "c e"], Float[Tensor, ""]]:
        """Image embeddings, text embeddings, and the factor on their similarities."""
        return self.encode_image(pixels), self.encode_text(tokens), self.logit_scale.exp()

    def checkpoint_activations(self) -> None:
        """Trade time for memory in training, in both towers; see `VisionTower.checkpoint_activations`.

        Raises:
            ConfigError: a tower does not offer it.
        """
        self.tower.checkpoint_activations()
        for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
            parts = (part for part in self.text.modules() if hasattr(part, name))
            if (part := next(parts, None)) is not None:
                getattr(part, name)()
                return
        raise ConfigError(f"{type(self.text).__name__} does not offer activation checkpointing")

    def fingerprint(self) -> str:
        """What tells this model's embeddings from another's: a hash of its weights and its preprocessing."""
        return fingerprint(self, repr(self.image_processor.config))

    def portable_config(self) -> BackboneConfig:
        """The config of both sides, complete enough to build them again with the tokenizer's files alone."""
        return self.tower.backbone.portable_config().model_copy(update=self._fields)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads, and `VisionTower.from_pretrained` too.

        The files of a tokenizer that does not come with its library lie in `tokenizer/`.
        """
        portable = self.config.model_copy(update={"backbone": self.portable_config()})
        content = {"model_type": DUAL_ENCODER_TYPE, "tower": portable.model_dump(mode="json")}
        save_folder(folder, content, self.state_dict(), self.image_processor, self.tokenizer)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> DualEncoder:
        """Load a folder or hub id that `save_pretrained` wrote, in evaluation mode.

        Raises:
            ConfigError: no such folder, or not a dual encoder.
            WeightsError: weights that do not fit.
        """
        folder = resolve_folder(source)
        config, state = read_folder(folder, DUAL_ENCODER_TYPE)
        with without_init():
            backbone = config.backbone.build(load_weights=False)
            text = _with_tokenizer(config.backbone, folder).build_text(load_weights=False)
        # Older folders have neither SigLIP's bias nor CoCa's decoder, and a CLIP may have been given a bias.
        has_decoder = any(name.startswith("text_decoder.") for name in state)
        text = replace(
            text,
            logit_bias=0.0 if "logit_bias" in state else None,
            text_decoder=text.text_decoder if has_decoder else None,
        )
        model = cls(VisionTower(config, backbone), text)
        load_strict(model, state, str(folder))
        return model.eval()


def caption_loss(
    logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"], pad_id: int
) -> Float[Tensor, ""]:
    """Mean cross-entropy of every token given those before it and the picture; padding does not count.

    Equals the caption part of `open_clip.loss.CoCaLoss` at weight 1 (CoCa, arXiv:2205.01917, section 3.2).

    Args:
        logits: of `DualEncoder.caption_logits` or `decode`.
        pad_id: `tokenizer.pad_id`.
    """
    following = tokens[:, 1:].to(logits.device)
    return cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), ignore_index=pad_id)


def load_dual_encoder(source: Source, **overrides: Any) -> DualEncoder:
    """Load a dual encoder, in evaluation mode, from any source that `load_tower` takes.

    Args:
        source: `open_clip:model@weights`, `transformers:hub id or folder` of a CLIP, SigLIP or SigLIP2, a
            YAML file, a folder that `DualEncoder.save_pretrained` wrote, or a mapping.
        overrides: fields of `TowerConfig`.

    Raises:
        ConfigError: the source or a field is not known, or has no text tower.
        WeightsError: the weights are missing or do not fit.
    """
    folder = saved_folder(source)
    if folder is not None and not overrides:
        return DualEncoder.from_pretrained(folder)
    if folder is not None:
        raise ConfigError(f"{folder}: a saved dual encoder takes no overrides, got {', '.join(overrides)}")
    config = tower_config(source, **{**overrides, "pooled_head": True})
    text = config.backbone.build_text()
    return DualEncoder(VisionTower(config, config.backbone.build()), text).eval()


def describe_dual_encoder(source: Source) -> DualEncoder:
    """The dual encoder of any source, without its weights, on the meta device; see `describe_tower`.

    Raises:
        ConfigError: the source or a field is not known, or has no text tower.
    """
    tower, folder = describe_tower(source, pooled_head=True), saved_folder(source)
    config = tower.config.backbone
    with torch.device("meta"):
        text = (config if folder is None else _with_tokenizer(config, folder)).build_text(load_weights=False)
        return DualEncoder(tower, text).eval()


def _with_tokenizer(config: BackboneConfig, folder: Path) -> BackboneConfig:
    """A saved config whose tokenizer's files are those that were saved with it, if there are any."""
    files = folder / TOKENIZER_FOLDER
    return config.model_copy(update={"tokenizer": str(files)}) if files.is_dir() else config
