"""Small forms of every projector, for 24 channels: a new name joins all tests by its row here."""

from __future__ import annotations

from typing import Any

# Those that map patches by place.
FORMS: dict[str, list[dict[str, Any]]] = {
    "identity": [{}],
    "linear": [{}],
    "mlp": [{}, {"depth": 1}, {"activation": "silu", "depth": 3}],
    "mlp_res": [{}, {"depth": 1, "blocks": 1}],
    "fused_gelu_mlp": [{}],
    "pixel_shuffle": [{"factor": 2}, {"factor": 1}],
    "mlp_downsample": [{}, {"variant": "3x3"}, {"variant": "3x3_s2"}, {"variant": "3x3_s2_new"}],
    "pool": [
        *(
            {"mode": mode, "first": first}
            for mode in ("average", "bilinear", "max")
            for first in ("pool", "mlp")
        ),
        *({"mode": mode, "target": [2, 3]} for mode in ("average", "bilinear", "max")),
        {"stride": 3},
    ],
    "pooler": [{}],
    "spatial_pool": [{}, {"width": 16, "stride": 3, "depth": 1}],
    "c_abstractor": [
        {"target": [2, 2], "depth": 1, "hidden_size": 32},
        {"target": [1, 3], "depth": 2, "hidden_size": 24, "mlp_depth": 1, "pos_emb": False},
    ],
    "ldp": [{}],
    "ldpv2": [{"target": [2, 2]}],
}

# Those that attend.
ATTENDING: dict[str, dict[str, Any]] = {
    "qformer": {"layers": 2, "heads": 2, "hidden_size": 32, "num_queries": 5},
    "qformer_text": {
        "layers": 3,
        "heads": 2,
        "hidden_size": 32,
        "num_queries": 5,
        "vocab_size": 30,
        "max_text": 9,
    },
    "perceiver_resampler": {"layers": 2, "heads": 2, "head_width": 8, "num_latents": 5},
    "idefics2_perceiver": {
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 8,
        "num_latents": 5,
        "hidden_size": 20,
    },
    "token_packer": {"scale": 2, "levels": 3, "width": 16, "heads": 2},
    "sva": {"widths": [8, 16], "regions": [1, 2], "layers": 2, "width": 16, "heads": 2},
}
