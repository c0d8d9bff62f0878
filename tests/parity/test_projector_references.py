"""Projectors against the code that they come from, and against numbers recorded from it.

`VLM_VISION_PROJECTOR_REFERENCES=FOLDER python tests/parity/test_projector_references.py` records anew; the
same variable makes pytest run the comparison itself. tests/references.py tells what the folder holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from references import LLAVA_NEXT, PROJECTORS, checkout, llava, module_of
from torch import Tensor, nn

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.llava_files import from_llava, to_llava
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.projector_keys import load_projector_weights

RECORDED = Path(__file__).parents[1] / "fixtures" / "projectors.json"
KEPT = 48  # numbers of an output that are recorded
D, L = 12, 16
TOLERANCE = 1e-6  # of the largest output; measured: 0 for each of them


@dataclass(frozen=True)
class Case:
    """A reference's projector and ours.

    Attributes:
        config: ours.
        reference: makes theirs.
        grids: square ones, as theirs all want; the first is the one it is built for.
        prefix: where their checkpoints hold it.
    """

    config: Any
    reference: Callable[[], nn.Module]
    grids: tuple[int, ...] = (6,)
    prefix: str = "model.mm_projector."
    widths: tuple[int, int] = field(default=(D, L))


@cache
def module(folder: str, name: str, **beside: str) -> ModuleType:
    return module_of(checkout(PROJECTORS) / folder, name, **beside)


def settings(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(mm_hidden_size=D, hidden_size=L, **more)


def of_llava(kind: str, repository: str = "LLaVA") -> nn.Module:
    builder = module(f"{repository}/llava/model/multimodal_projector", "builder")
    vision = SimpleNamespace(image_size=24, patch_size=4)
    made: nn.Module = builder.build_vision_projector(settings(mm_projector_type=kind), vision_cfg=vision)
    return made


class PooledAfter(nn.Module):
    """LLaVA-NeXT's way with frames of a video: the projector, then `get_2dPool`."""

    def __init__(self, mode: str, stride: int) -> None:
        super().__init__()
        self.mm_projector, self.mode, self.stride = of_llava("mlp2x_gelu", "LLaVA-NeXT"), mode, stride

    def forward(self, patches: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(LLAVA_NEXT, str(checkout(PROJECTORS) / "LLaVA-NeXT"))
            arch = next_arch()
        model = SimpleNamespace(
            config=SimpleNamespace(mm_spatial_pool_mode=self.mode),
            get_vision_tower=lambda: SimpleNamespace(num_patches_per_side=int(patches.shape[1] ** 0.5)),
        )
        features = self.mm_projector(patches)
        tokens: Tensor = arch.LlavaMetaForCausalLM.get_2dPool(model, features, self.stride)
        return tokens


@cache
def next_arch() -> ModuleType:
    arch: ModuleType = llava(LLAVA_NEXT).arch
    return arch


class Resampled(nn.Module):
    """LLaVA-NeXT's resampler, and the projector that follows it."""

    def __init__(self) -> None:
        super().__init__()
        options = {"mode": "conv", "stride": 2, "out_channels": 8}
        named = SimpleNamespace(**{f"mm_spatial_pool_{key}": value for key, value in options.items()})
        pool = module("LLaVA-NeXT/llava/model/multimodal_resampler", "spatial_pool").SpatialPool
        self.vision_resampler = pool(named, SimpleNamespace(hidden_size=D))
        builder = module("LLaVA-NeXT/llava/model/multimodal_projector", "builder")
        config = SimpleNamespace(mm_hidden_size=8, hidden_size=L, mm_projector_type="mlp2x_gelu")
        self.mm_projector = builder.build_vision_projector(config)

    def forward(self, patches: Tensor) -> Tensor:
        side = int(patches.shape[1] ** 0.5)
        tokens: Tensor = self.mm_projector(self.vision_resampler(patches, torch.empty(1, 3, side, side)))
        return tokens


def of_mobilevlm(kind: str) -> nn.Module:
    projectors = module("MobileVLM/mobilevlm/model", "vision_projector")
    made: nn.Module = projectors.build_vision_projector(settings(mm_projector_type=kind))
    return made


def of_vila(kind: str) -> nn.Module:
    projectors = module("VILA/llava/model/multimodal_projector", "base_projector")
    config = projectors.MultimodalProjectorConfig(kind)
    made: nn.Module = projectors.MultimodalProjector(config, settings())
    return made


class Abstractor(nn.Module):
    """Honeybee's, which adds its embedding into the patches themselves."""

    def __init__(self, side: int, hidden_size: int, **options: Any) -> None:
        super().__init__()
        projectors = module(
            "honeybee/honeybee",
            "projectors.projectors",
            configuration_honeybee="HoneybeeVisualProjectorConfig",
        )
        config = {"num_eos_tokens": 0, "pos_emb": True, "depth": 2, "mlp_depth": 2, "num_query_tokens": 9}
        config |= {"hidden_size": hidden_size, "encoder_hidden_size": D, "output_hidden_size": L, **options}
        self.abstractor = projectors.CAbstractor(SimpleNamespace(**config), side**2)

    def forward(self, patches: Tensor) -> Tensor:
        tokens: Tensor = self.abstractor(patches.clone()).last_hidden_state
        return tokens


def of_nanovlm(factor: int) -> nn.Module:
    config = SimpleNamespace(vit_hidden_dim=D, lm_hidden_dim=L, mp_pixel_shuffle_factor=factor)
    made: nn.Module = module("nanoVLM/models", "modality_projector").ModalityProjector(config)
    return made


def of_prismatic(kind: str) -> nn.Module:
    made: nn.Module = getattr(module("prismatic-vlms/prismatic/util", "nn_utils"), kind)(D, L)
    return made


def pooled(mode: str, stride: int) -> dict[str, Any]:
    return {"name": "pool", "mode": mode, "stride": stride, "first": "mlp"}


def abstractor(**options: Any) -> dict[str, Any]:
    return {"name": "c_abstractor", "target": [3, 3], "depth": 2, **options}


CASES = {
    "LLaVA identity": Case("identity", partial(of_llava, "identity"), widths=(D, D)),
    "LLaVA linear": Case("linear", partial(of_llava, "linear")),
    "LLaVA mlp2x_gelu": Case("mlp2x_gelu", partial(of_llava, "mlp2x_gelu")),
    "LLaVA mlp3x_gelu": Case("mlp3x_gelu", partial(of_llava, "mlp3x_gelu")),
    "LLaVA-NeXT mlp2x_gelu": Case("mlp2x_gelu", partial(of_llava, "mlp2x_gelu", "LLaVA-NeXT")),
    "LLaVA-NeXT mlp2x_res2x_gelu": Case(
        "mlp2x_res2x_gelu", partial(of_llava, "mlp2x_res2x_gelu", "LLaVA-NeXT")
    ),
    "LLaVA-NeXT pooler": Case("pooler", partial(of_llava, "pooler", "LLaVA-NeXT")),
    "LLaVA-NeXT spatial_pool": Case({"name": "spatial_pool", "width": 8}, Resampled, (6, 7), "model."),
    **{
        f"LLaVA-NeXT get_2dPool {mode} {stride}": Case(
            pooled(mode, stride), partial(PooledAfter, mode, stride), (6, 7), "model."
        )
        for mode in ("average", "max", "bilinear")
        for stride in (2, 3)
    },
    "MobileVLM mlp2x_gelu": Case("mlp2x_gelu", partial(of_mobilevlm, "mlp2x_gelu")),
    "MobileVLM ldpnet": Case("ldp", partial(of_mobilevlm, "ldpnet"), (6, 7)),
    "MobileVLM ldpnetv2": Case("ldpv2", partial(of_mobilevlm, "ldpnetv2"), (24, 16, 13)),
    "VILA linear": Case("linear", partial(of_vila, "linear"), prefix=""),
    "VILA mlp2x_gelu": Case("mlp2x_gelu", partial(of_vila, "mlp2x_gelu"), prefix=""),
    **{
        f"VILA {kind}": Case(config, partial(of_vila, kind), (6, 7, 8), "")
        for kind, config in (
            ("mlp_downsample", "mlp_downsample"),
            ("mlp_downsample_2x2_fix", "mlp_downsample_2x2_fix"),
            ("mlp_downsample_3x3_fix", "mlp_downsample_3x3_fix"),
            ("mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2"),
            ("mlp_downsample_3x3_s2_new", "mlp_downsample_3x3_s2_new"),
        )
    },
    "Honeybee c-abs": Case(abstractor(hidden_size=20), partial(Abstractor, 6, 20), prefix=""),
    "Honeybee c-abs of one width": Case(
        abstractor(hidden_size=D, mlp_depth=1),
        partial(Abstractor, 7, D, mlp_depth=1),
        (7,),
        prefix="",
    ),
    "nanoVLM": Case({"name": "pixel_shuffle", "factor": 4}, partial(of_nanovlm, 4), (8, 12), "MP."),
    "nanoVLM by 3": Case({"name": "pixel_shuffle", "factor": 3}, partial(of_nanovlm, 3), (6, 9), "MP."),
    "Prismatic linear": Case("linear", partial(of_prismatic, "LinearProjector"), prefix=""),
    "Prismatic gelu-mlp": Case("mlp2x_gelu", partial(of_prismatic, "MLPProjector"), prefix=""),
    "Prismatic fused-gelu-mlp": Case("fused_gelu_mlp", partial(of_prismatic, "FusedMLPProjector"), prefix=""),
}


def drawn(shape: tuple[int, ...], number: int) -> Tensor:
    """Values in -0.5 ... 0.5 by whole-number arithmetic, so that no library or generator matters."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return ((count * count * 31 + count * 7 + number * 13) % 1009 / 1009 - 0.5).float().reshape(shape)


def weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Tensors by name, of a size that keeps what they make about 1."""
    scaled = {}
    for number, (name, shape) in enumerate(shapes.items()):
        scale = 1.0 if len(shape) == 1 else 4.0 / torch.Size(shape[1:]).numel() ** 0.5
        scaled[name] = drawn(tuple(shape), number) * scale + 0.5 * (len(shape) == 1)
    return scaled


def patches(side: int) -> Tensor:
    return 4 * drawn((2, side * side, D), side)


def ours(case: Case, state: dict[str, Tensor]) -> Projector:
    projector = build_projector(case.config, *case.widths, (case.grids[0], case.grids[0]))
    load_projector_weights(projector, {f"{case.prefix}{name}": value for name, value in state.items()})
    return projector.eval()


def shapes_of(reference: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in reference.state_dict().items()}


def theirs(case: Case) -> nn.Module:
    reference = case.reference().eval()
    own, state = dict(reference.named_parameters()), weights(shapes_of(reference))
    with torch.no_grad():  # Honeybee's `load_state_dict` looks for names of the whole model
        for name, value in state.items():
            own[name].copy_(value)
    return reference


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_the_reference(name: str) -> None:
    case = CASES[name]
    reference = theirs(case)
    projector = ours(case, reference.state_dict())
    worst = 0.0
    for side in case.grids:
        expected = reference(patches(side))
        found = projector(patches(side), (side, side))
        assert found.shape == expected.shape
        assert expected.std() > 0.05
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    print(f"{name}: worst error {worst:.1e}")
    assert worst <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_recorded_of_the_reference(name: str) -> None:
    case, recorded = CASES[name], json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    projector = ours(case, weights(recorded["shapes"]))
    for side in case.grids:
        expected = torch.tensor(recorded["outputs"][str(side)])
        found = kept(projector(patches(side), (side, side)))
        # Measured equal where they were recorded; other processors sum in another order.
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp2x_res2x_gelu", "pooler"])
def test_llava_next_loads_what_is_written_for_it(kind: str, tmp_path: Path) -> None:
    projector = build_projector(kind, D, L, (6, 6))
    assert to_llava(projector, tmp_path) == {"mm_projector_type": kind, "mm_hidden_size": D}
    reference = of_llava(kind, "LLaVA-NeXT")
    saved = torch.load(tmp_path / "mm_projector.bin", map_location="cpu")
    # As `initialize_vision_modules` does it.
    reference.load_state_dict({name.split("mm_projector.")[1]: tensor for name, tensor in saved.items()})
    assert torch.equal(reference(patches(6)), projector(patches(6)))
    assert from_llava(tmp_path, (6, 6)).config == projector.config


@torch.no_grad()
def test_internvl_is_mlp_downsample() -> None:
    """Its weights by their names in its own checkpoints, its function as transformers has it."""
    modeling = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    config = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=D),
        text_config=SimpleNamespace(hidden_size=L),
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )
    reference = modeling.InternVLMultiModalProjector(config)
    state = weights(shapes_of(reference))
    reference.load_state_dict(state)
    numbers = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
    named = {f"mlp1.{numbers[name.split('.')[0]]}.{name.split('.')[1]}": state[name] for name in state}
    projector = build_projector("mlp_downsample", D, L, (6, 6))
    load_projector_weights(projector, named)
    plane = patches(6).reshape(2, 6, 6, D)
    shuffled = modeling.InternVLModel.pixel_shuffle(None, plane, scale_factor=0.5).flatten(1, 2)
    expected = reference(shuffled)
    assert float((projector(patches(6)) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def kept(output: Tensor) -> Tensor:
    """Some numbers of an output, of all its tokens' places and channels."""
    flat = output.flatten()
    return flat[torch.arange(KEPT) * 7919 % len(flat)]


def record() -> dict[str, Any]:
    found = {}
    for name, case in CASES.items():
        reference = theirs(case)
        outputs = {side: kept(reference(patches(side))).tolist() for side in case.grids}
        found[name] = {"shapes": shapes_of(reference), "outputs": outputs}
    return found


if __name__ == "__main__":
    with torch.no_grad():
        text = json.dumps(record(), separators=(",", ":")).replace('"LLaVA', '\n"LLaVA')
    RECORDED.write_text(text + "\n", encoding="utf-8")
