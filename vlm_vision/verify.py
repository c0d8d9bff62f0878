"""Parity of towers with the libraries they come from, on random weights."""

from __future__ import annotations

import inspect
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vlm_vision.backbone import Backbone
from vlm_vision.compat import clip_vision_trunk
from vlm_vision.errors import ConfigError, first_line
from vlm_vision.features import resolve_layers
from vlm_vision.tower import VisionTower, describe_tower, tower_config
from vlm_vision.tower_config import BACKBONES
from vlm_vision.weights import without_init

# Largest difference allowed, as a share of the reference's largest value. Sums in another order make 1e-6;
# the smallest errors of a model, tanh's GELU for the exact one or a norm's eps of 1e-5 for 1e-6, make 2e-4.
TOLERANCE = 1e-5
# Of the pictures' values. A norm's eps is only seen where what it divides by is small.
FAINT = 0.05
# What a library computes of pixels: patches of a layer (from 1), and the image embedding if there is one.
Reference = Callable[[Tensor, int], tuple[Float[Tensor, "b n d"], Float[Tensor, "b e"] | None]]

# Floats between tensors of one shape in their noise, whole cache lines, and the range in which they start.
NOISE_STEP, NOISE_SPREAD = 16 * 257, 1 << 16
GIB, FLOAT_BYTES = 1 << 30, 4
WORKING_BYTES = GIB // 2  # what the layer that runs holds, and code that is loaded for the first model


@dataclass(frozen=True)
class Facts:
    """What was compared: the tower of a name as it comes, and the layer it gives.

    Attributes:
        size: rows and columns of pixels.
        patch: pixels between patches of the layer.
        grid: rows and columns of patches after the layer.
        layers: how many the backbone has.
        layer: the one compared, from 1.
        width: channels after it.
        parameters: of the whole backbone.
    """

    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    layers: int
    layer: int
    width: int
    parameters: int

    @classmethod
    def of(cls, backbone: Backbone) -> Facts:
        info = backbone.info
        size = (info.preprocess.height, info.preprocess.width)
        layer = resolve_layers(None, info.num_layers, info.default_layer)[0]
        grid = info.grids[layer - 1]
        return cls(
            size=size,
            patch=size[0] // grid[0],
            grid=grid,
            layers=info.num_layers,
            layer=layer,
            width=info.widths[layer - 1],
            parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        )


@dataclass(frozen=True)
class Verification:
    """How far a tower is from its library's own model with the same weights.

    Attributes:
        facts: None where it could not be built.
        patches: worst difference of the default layer's patch features, as a share of the largest.
        pooled: the same of the image embedding; None where there is none.
        failure: why it could not be compared, or empty.
        skipped: what this machine lacks for it, or empty.
    """

    name: str
    seconds: float
    facts: Facts | None = None
    patches: float | None = None
    pooled: float | None = None
    failure: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        errors = [error for error in (self.patches, self.pooled) if error is not None]
        return bool(errors) and max(errors) <= TOLERANCE

    @property
    def verdict(self) -> str:
        if self.failure:
            return f"FAILED {self.failure}"
        if self.skipped:
            return f"SKIPPED {self.skipped}"
        return "equal" if self.passed else "DIFFERS"


def format_error(error: float | None) -> str:
    """An error of a verification in a table's cell."""
    return "-" if error is None else f"{error:.1e}" if error else "0"


def can_verify(name: str) -> bool:
    """Whether the source of `source:model` has another library to compare with."""
    return name.partition(":")[0] in _REFERENCES


def check_names(names: Iterable[str]) -> None:
    """Refuse names that `verify` could not build, before it builds any.

    Raises:
        ConfigError: an unknown source or model, or a source without another library.
    """
    for name in names:
        source = name.partition(":")[0]
        BACKBONES.config_class(source)
        if not can_verify(name):
            raise ConfigError(
                f"{name}: {source!r} has no other library to compare with (those that have: "
                f"{', '.join(_REFERENCES)}); vlm_vision.testing.check_tower tests a backbone's contract"
            )
        describe_tower(f"{name}@none")


def verify(names: Iterable[str]) -> Iterator[Verification]:
    """Compare towers, `source:model` each, with their libraries: one picture of noise, in float32 on a CPU.

    A tower takes little memory, whatever its size (see `fill_with_noise`); where even that is not free, it is
    skipped.
    """
    for name in names:
        start = time.monotonic()
        facts, found = None, dict[str, Any]()
        try:
            config = tower_config(f"{name}@none")
            with without_init():
                backbone = config.backbone.build().eval()
            facts = Facts.of(backbone)
            needed, free = needed_memory(backbone), free_memory()
            if needed > free:
                found["skipped"] = f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
            else:
                found = _compare(config, backbone, _REFERENCES[name.partition(":")[0]])
        except Exception as error:  # whatever a library raises is a finding about this one model
            found["failure"] = first_line(error)
        yield Verification(name, time.monotonic() - start, facts, **found)


@torch.no_grad()
def _compare(config: Any, backbone: Backbone, build: Callable[[Any], Reference]) -> dict[str, Any]:
    fill_with_noise(backbone)
    reference = build(backbone)
    preprocess = backbone.info.preprocess
    generator = torch.Generator().manual_seed(0)
    pixels = FAINT * torch.randn(1, 3, preprocess.height, preprocess.width, generator=generator)
    pooled = None
    if backbone.info.embed_dim is not None:
        pooled = VisionTower(config.model_copy(update={"pooled_head": True}), backbone).pooled(pixels)
    # Asked for patches alone, the tower frees what lies behind: they must not change by it.
    tower = VisionTower(config, backbone)
    patches, embedding = reference(pixels, tower.layers[0])
    found = {"patches": _share(tower(pixels), patches)}
    if (pooled is None) != (embedding is None):
        raise ConfigError(f"pooled output: {'none' if pooled is None else 'one'}, unlike the library's model")
    if pooled is not None and embedding is not None:
        found["pooled"] = _share(pooled, embedding)
    return found


def _share(own: Tensor, theirs: Tensor) -> float:
    if own.shape != theirs.shape:
        raise ConfigError(f"features are {list(own.shape)}, the library's {list(theirs.shape)}")
    if not (own.isfinite().all() and theirs.isfinite().all()):
        raise ConfigError("features are not finite")
    return float((own - theirs).abs().max() / theirs.abs().max())


# Weights -------------------------------------------------------------------------------------------------


def fill_with_noise(model: nn.Module) -> None:
    """Random weights at once and in little memory; libraries' own initialisation takes minutes.

    Tensors of one shape are parts of one noise, each from another place: no two are equal, and seven billion
    parameters take half a GiB. They are for reading only. Matrices keep the scale of what passes through
    them; gains are near one, all else is small.
    """
    generator = torch.Generator().manual_seed(0)
    noises: dict[tuple[torch.Size, bool], Tensor] = {}
    places = Counter[tuple[torch.Size, bool]]()
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        kind = (tensor.shape, _is_gain(name, tensor))
        if kind not in noises:
            noises[kind] = _noise(*kind, generator)
        start = places[kind] * NOISE_STEP % NOISE_SPREAD
        places[kind] += 1
        state[name] = noises[kind][start : start + tensor.numel()].view(tensor.shape)
    model.load_state_dict(state, assign=True)


def _is_gain(name: str, tensor: Tensor) -> bool:
    return tensor.ndim < 2 and name.endswith(("running_var", "weight", "gamma", "lambda1"))


def _noise(shape: torch.Size, gain: bool, generator: torch.Generator) -> Float[Tensor, " n"]:
    noise = torch.randn(shape.numel() + NOISE_SPREAD, generator=generator)
    if gain:
        return noise.mul_(0.1).abs_().add_(0.9)
    is_matrix = len(shape) > 1 and shape[0] > 1  # else a bias, or tokens and positions as a batch of one
    return noise.mul_(max(shape[1:].numel(), 1) ** -0.5 if is_matrix else 0.02)


def needed_memory(backbone: Backbone) -> int:
    """Bytes that comparing a backbone takes: its noise, and every layer's output of one picture."""
    noises = {(tensor.shape, _is_gain(name, tensor)) for name, tensor in backbone.state_dict().items()}
    floats: int = sum(shape.numel() + NOISE_SPREAD for shape, _ in noises)
    info = backbone.info
    floats += sum(
        width * rows * columns for width, (rows, columns) in zip(info.widths, info.grids, strict=True)
    )
    return FLOAT_BYTES * floats + WORKING_BYTES


def free_memory() -> int:
    """Bytes that can be taken without swapping."""
    try:
        import psutil
    except ImportError:
        return int(os.sysconf("SC_AVPHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))
    return int(psutil.virtual_memory().available)


# References ----------------------------------------------------------------------------------------------


def _open_clip(backbone: Any) -> Reference:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel

    from vlm_vision.backbones.open_clip import build_visual

    with without_init():
        theirs: Any = build_visual(backbone.portable_config().architecture).eval()
    theirs.load_state_dict(backbone.visual.state_dict(), assign=True)
    if isinstance(theirs, TimmModel):
        return _of_trunk(theirs, theirs.trunk)
    staged = isinstance(theirs, ModifiedResNet)

    def reference(pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        block = theirs.get_submodule(f"layer{layer - 1}" if staged else f"transformer.resblocks.{layer - 1}")
        outputs: list[Tensor] = []
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        embedding = theirs(pixels)
        patches = rearrange(outputs[0], "b d h w -> b (h w) d") if staged else outputs[0][:, 1:]
        return patches, embedding[0] if isinstance(embedding, tuple) else embedding  # CoCa gives tokens too

    return reference


def _timm(backbone: Any) -> Reference:
    import timm

    with without_init():
        theirs = timm.create_model(backbone.portable_config().model, num_classes=0).eval()
    theirs.load_state_dict(backbone.model.state_dict(), assign=True)
    return _of_trunk(theirs, theirs)


def _of_trunk(model: Any, trunk: Any) -> Reference:
    """Of a model of timm, or one of open_clip around it."""

    def reference(pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        maps = trunk.forward_intermediates(
            pixels, indices=[layer - 1], output_fmt="NCHW", intermediates_only=True
        )
        return rearrange(maps[0], "b d h w -> b (h w) d"), model(pixels)

    return reference


def _transformers(backbone: Any) -> Reference:
    from transformers import AutoConfig, AutoModel

    fields = dict(backbone.portable_config().architecture)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with without_init():
        theirs = AutoModel.from_config(config).float().eval()
    _take_weights(theirs, backbone)
    info = backbone.info

    def reference(pixels: Tensor, layer: int) -> tuple[Tensor, Tensor | None]:
        output = run_transformers(theirs, pixels)
        state = output.hidden_states[-info.num_layers :][layer - 1]
        patches = (
            rearrange(state, "b d h w -> b (h w) d") if state.ndim == 4 else state[:, info.prefix_tokens :]
        )
        if config.model_type == "vit_mae":  # has no pooled output of its own
            return patches, output.last_hidden_state[:, 0]
        embedding = getattr(output, "pooler_output", None)
        return patches, None if embedding is None else embedding.flatten(1)

    return reference


def _take_weights(theirs: Any, backbone: Any) -> None:
    """Give a model of transformers the weights of a backbone, whose own names differ.

    Raises:
        ConfigError: one of the two has a tensor that the other has not.
    """
    from vlm_vision.backbones.transformers_any import GenericBackbone
    from vlm_vision.backbones.transformers_vit import FAMILIES

    trunk, state = clip_vision_trunk(theirs), backbone.state_dict()
    if isinstance(backbone, GenericBackbone):
        trunk, places = theirs, {"model": ""}
    else:
        family = FAMILIES[theirs.config.model_type]
        modules = dict(trunk.named_modules())
        places = {
            "embeddings": "embeddings.",
            "pre_norm": f"{family.pre_norm}.",
            "blocks": next(f"{path}." for path in family.blocks if path in modules),
            "norm": f"{family.norm}.",
            "head": "head.",
        }
    named = {places[name.partition(".")[0]] + name.partition(".")[2]: value for name, value in state.items()}
    for name, tensor in trunk.state_dict().items():
        # Masks are for pre-training, and no registers are an empty tensor: towers hold neither.
        if tensor.numel() == 0 or name.endswith("mask_token"):
            named.setdefault(name, torch.zeros(tensor.shape))
    report = trunk.load_state_dict(named, strict=False, assign=True)
    if report.missing_keys or report.unexpected_keys:
        raise ConfigError(
            f"only the library has {report.missing_keys}, only the tower {report.unexpected_keys}"
        )


def run_transformers(model: Any, pixels: Float[Tensor, "b 3 h w"]) -> Any:
    """What a vision model of transformers makes of pixels, with hidden states, whatever else it asks for.

    Position embeddings are interpolated where they must be; ViT-MAE hides nothing and shuffles nothing.
    """
    options: dict[str, Any] = {"output_hidden_states": True}
    parameters, patch = inspect.signature(model.forward).parameters, getattr(model.config, "patch_size", 0)
    if "spatial_shapes" in parameters:  # NaFlex
        rows = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        shapes = torch.tensor([[pixels.shape[2] // patch, pixels.shape[3] // patch]] * len(pixels))
        mask = torch.ones(rows.shape[:2], dtype=torch.long)
        return model(rows, pixel_attention_mask=mask, spatial_shapes=shapes, **options)
    if "noise" in parameters:
        model.config.mask_ratio = 0.0
        count = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
        options["noise"] = torch.arange(count).expand(len(pixels), -1)
    if "interpolate_pos_encoding" in parameters:
        options["interpolate_pos_encoding"] = True
    return model(pixels, **options)


_REFERENCES: dict[str, Callable[[Any], Reference]] = {
    "open_clip": _open_clip,
    "timm": _timm,
    "transformers": _transformers,
}
