"""Idefics2's connector as a projector, on the module of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.perceiver_config import Idefics2PerceiverConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.errors import ConfigError

try:
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
except ImportError as error:
    raise ConfigError(
        f"transformers {transformers.__version__} has no Idefics2Connector, which 'idefics2_perceiver' "
        "needs: pip install -U transformers"
    ) from error


class Idefics2Perceiver(Projector):
    """[B,N,D] -> [B,num_latents,L]. Keys `connector.*` as in `Idefics2ForConditionalGeneration`.

    Linear layers start as N(0, 0.02), as there. Latents start as N(0, 1), as Flamingo's: transformers fills
    them with ones, and latents that are the same once stay the same for ever.
    """

    def __init__(
        self, config: Idefics2PerceiverConfig, in_features: int, out_features: int, grid: Grid
    ) -> None:
        super().__init__(config, in_features, out_features, grid)
        widths: dict[str, Any] = {"model_type": "mistral", "intermediate_size": config.hidden_size}
        settings = Idefics2Config(
            vision_config={"hidden_size": in_features},
            text_config={**widths, "hidden_size": out_features, "hidden_act": "silu"},
            perceiver_config={
                "hidden_size": out_features,
                "hidden_act": "silu",
                "rms_norm_eps": config.norm_eps,
                "resampler_n_latents": config.num_latents,
                "resampler_depth": config.layers,
                "resampler_n_heads": config.heads,
                "resampler_head_dim": config.head_width,
                "num_key_value_heads": config.kv_heads,
            },
        )
        self.connector = Idefics2Connector(settings)
        for module in self.connector.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.connector.perceiver_resampler.latents)

    def forward(self, patches: Float[Tensor, "b n d"], grid: Grid | None = None) -> Float[Tensor, "b m l"]:
        everything = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        tokens: Tensor = self.connector(patches, everything)
        return tokens
