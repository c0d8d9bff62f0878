"""What a contrastive run minimises: outputs of a dual encoder, chunk by chunk, and the loss of them all."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import embedding, interpolate, normalize

from vlm_vision.dual_encoder import DualEncoder, caption_loss, load_dual_encoder
from vlm_vision.errors import ConfigError
from vlm_vision.tower import VisionTower
from vlm_vision.train.contrastive_config import LossConfig
from vlm_vision.train.gradient_cache import LOCAL, Outputs
from vlm_vision.train.losses import distill_loss, info_nce_loss, siglip_loss


class Objective(nn.Module):
    """A dual encoder with what only its training needs: heads, references, teachers.

    `forward` gives the outputs of a chunk; `loss` takes those of all chunks of this rank.

    Attributes:
        model: the dual encoder that is trained.
        patch_head: pools patch features for `patch_weight`, else None.
    """

    def __init__(self, model: DualEncoder, config: LossConfig) -> None:
        """Freeze a copy of the tower as it is, where the config keeps features.

        Raises:
            ConfigError: the loss needs a part that the model does not have.
        """
        super().__init__()
        if config.name == "siglip" and model.logit_bias is None:
            raise ConfigError("loss siglip: this model has no logit_bias")
        if config.caption_weight and model.text_decoder is None:
            raise ConfigError("loss.caption_weight: this model has no text decoder; a CoCa has one")
        self.model, self.config = model, config
        self.patch_head: PatchHead | None = None
        if config.patch_weight:
            assert model.tower.embed_dim is not None
            self.patch_head = PatchHead(model.tower.hidden_size, model.tower.embed_dim)
        # In lists, for these are no parts of what learns or is saved.
        self._reference = [_frozen_reference(model.tower)] if config.keep else []
        self._teacher: list[DualEncoder] = []
        if config.distill:
            self._teacher = [load_dual_encoder(config.distill.teacher).requires_grad_(False)]

    def move_references(self, device: torch.device) -> None:
        """Put references and teachers where the model is."""
        for frozen in (*self._reference, *self._teacher):
            frozen.to(device)

    def forward(
        self,
        pixels: Float[Tensor, "b 3 h w"] | None = None,
        image_features: Float[Tensor, "b d"] | None = None,
        tokens: Int[Tensor, "c t"] | None = None,
        captions: Int[Tensor, "b t"] | None = None,
        replay: Float[Tensor, "r 3 h w"] | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> Outputs:
        """Unit-length embeddings of a chunk, in float32, the temperature, and `local` additions to the loss.

        Args:
            pixels, tokens: of pictures and texts, each the ones of this chunk; a chunk may lack one.
            image_features: instead of pixels, what the tower pools before its projection, if that is known.
            captions: tokens of each picture's own caption, for the caption loss.
            replay: pictures whose features are kept; None keeps those of `pixels`.
            shares: what part of the batch's pictures (`pixels`), caption tokens (`captions`) and replayed
                pictures (`replay`) this chunk holds.
        """
        model, config, outputs = self.model, self.config, Outputs()
        is_learning, shares = torch.is_grad_enabled(), shares or {}
        local: list[Tensor] = []
        if image_features is not None:
            projected = model.project_image(model.tower.backbone.project(image_features))
            outputs["image"] = normalize(projected.float(), dim=-1)
        elif pixels is not None:
            features, embeddings, image_tokens = self._see(pixels)
            outputs["image"] = normalize(embeddings.float(), dim=-1)
            if self.patch_head is not None and features is not None:
                outputs["patch"] = normalize(self.patch_head(features).float(), dim=-1)
            if is_learning and config.keep and config.keep.data is None and features is not None:
                share = config.keep.weight * shares.get("pixels", 1.0)
                local.append(share * self._distance(pixels, features))
            if is_learning and captions is not None and image_tokens is not None:
                logits = model.decode(image_tokens, model.encode_text_with_tokens(captions)[1])
                share = config.caption_weight * shares.get("captions", 1.0)
                local.append(share * caption_loss(logits.float(), captions, model.tokenizer.pad_id))
        if is_learning and replay is not None and config.keep:
            share = config.keep.weight * shares.get("replay", 1.0)
            local.append(share * self._distance(replay, model.tower(replay)))
        if tokens is not None:
            found = model.text(tokens)  # of a CoCa, with the states that its decoder goes on
            outputs["text"] = normalize((found if isinstance(found, Tensor) else found[0]).float(), dim=-1)
        outputs["logit_scale"] = model.logit_scale.float().exp()
        if model.logit_bias is not None:
            outputs["logit_bias"] = model.logit_bias.float()
        if local:
            outputs[LOCAL] = torch.stack(local).sum()
        return outputs

    def loss(self, outputs: Outputs, facts: Mapping[str, Any]) -> Tensor:
        """The loss of this rank's share of the batch, `local` left out.

        Args:
            outputs: of all chunks.
            facts: `captions` [B], each picture's text among the rows of `text`; texts after them all are
                negatives; `num_captions`, how many are no negatives; `identities` [B,k] or None; `teacher`,
                what `teach` gave.
        """
        config, scale = self.config, outputs["logit_scale"]
        count = facts["num_captions"]
        # A caption that repeats is encoded once, and its gradients are summed here.
        text = embedding(facts["captions"], outputs["text"][:count])
        options: dict[str, Any] = {"tile_size": config.tile_size}
        if config.duplicates != "negative":
            options |= {"identities": facts["identities"], "duplicates": config.duplicates}
        if len(outputs["text"]) > count:
            options["negatives"] = outputs["text"][count:]

        def contrast(image: Tensor) -> Tensor:
            if config.name == "siglip":
                return siglip_loss(image, text, scale, outputs["logit_bias"], **options)
            loss = info_nce_loss(image, text, scale, **options)
            return 2 * loss if config.directions == "sum" else loss

        total = contrast(outputs["image"])
        if "patch" in outputs:
            total = total + config.patch_weight * contrast(outputs["patch"])
        if config.distill:
            image, texts, teacher_scale = facts["teacher"]
            total = total + config.distill.weight * distill_loss(
                outputs["image"], text, scale, image, texts, teacher_scale, tile_size=config.tile_size
            )
        return total

    @torch.no_grad()
    def teach(
        self, squares: UInt8[Tensor, "b h w 3"], texts: list[str], chunk: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The teacher's unit embeddings of this rank's pairs and its temperature; None without a teacher.

        It sees the student's squares, resampled to its own size where that is another.
        """
        if not self._teacher:
            return None
        teacher = self._teacher[0]
        processor, device = teacher.image_processor, teacher.logit_scale.device
        size = (processor.config.height, processor.config.width)
        image = []
        for part in torch.split(squares, chunk):
            pictures = rearrange(part.to(device), "b h w c -> b c h w").float()
            if pictures.shape[-2:] != size:
                pictures = interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 255)
            pixels = processor.normalise(rearrange(pictures / 255, "b c h w -> b h w c"))
            image.append(teacher.encode_image(pixels).float())
        text = [teacher.encode_text(part).float() for part in torch.split(teacher.tokenizer(texts), chunk)]
        return torch.cat(image), torch.cat(text), teacher.logit_scale.exp().float()

    def _see(self, pixels: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Patch features and tokens for a decoder, where something reads them, and embeddings."""
        model, tower = self.model, self.model.tower
        reads_patches = self.patch_head is not None or (self.config.keep and self.config.keep.data is None)
        if self.config.caption_weight:
            embeddings, image_tokens = model.encode_image_with_tokens(pixels)
            return (tower(pixels) if reads_patches else None), embeddings, image_tokens
        if not reads_patches:
            return None, model.project_image(tower.pooled(pixels)), None
        features, pooled = tower.features_with_pooled(pixels)
        return features, model.project_image(pooled), None

    def _distance(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Mean over patches of how far a feature went, squared, relative to its original length."""
        with torch.no_grad():
            original = self._reference[0](pixels).float()
        moved = (features.float() - original).square().sum(dim=-1)
        shares: Tensor = moved / original.square().sum(dim=-1).clamp(min=1e-12)
        return shares.mean()


class PatchHead(nn.Module):
    """Patch features pooled by attention of one learned query, and projected beside the texts.

    The pooling is SigLIP's (arXiv:2303.15343; `MAPHead` of big_vision), here of the layer that a VLM reads,
    so that texts teach this very layer. It is no part of the saved model.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        heads = next(count for count in (max(1, width // 64), 8, 4, 2, 1) if width % count == 0)
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised."""
        patches = self.norm(patches)
        query = self.query.expand(len(patches), -1, -1)
        pooled: Tensor = self.projection(self.attention(query, patches, patches, need_weights=False)[0][:, 0])
        return pooled


def _frozen_reference(tower: VisionTower) -> VisionTower:
    """The tower as it is now, up to the layer that is read."""
    reference = deepcopy(tower).eval().requires_grad_(False)
    reference.backbone.truncate(max(reference.layers))
    return reference
