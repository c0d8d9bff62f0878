"""The contract of a vision tower as one callable, for authors of backbones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from vlm_vision.errors import ConfigError, VlmVisionError
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.tower import VisionTower
from vlm_vision.tower_config import Select, TowerConfig

# Largest difference between a picture alone and in a batch, relative to the largest feature.
BATCH_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SAVED_SUFFIXES = {".json", ".safetensors"}


class ContractError(VlmVisionError):
    """A tower breaks clauses of the contract; names each of them."""


def check_tower(tower: VisionTower) -> None:
    """Check everything that a `VisionTower` promises, on random pixels; leaves the tower as it was.

    Needs about three times the tower's own memory and as much disk as its weights, for the round trip.

    Raises:
        ContractError: lists every broken clause with what was found.
    """
    broken = []
    for clause in CLAUSES:
        with _as_found(tower):
            try:
                clause(tower)
            except Exception as error:  # a clause that crashes is a broken clause
                name = clause.__name__.removeprefix("_").replace("_", " ")
                broken.append(f"  {name}: {error if isinstance(error, _BrokenError) else repr(error)}")
    if broken:
        raise ContractError(
            f"{type(tower.backbone).__name__} breaks {len(broken)} clause(s)\n" + "\n".join(broken)
        )


class _BrokenError(Exception):
    """What a clause found."""


def _expect(kept: bool, otherwise: str) -> None:
    if not kept:
        raise _BrokenError(otherwise)


@contextmanager
def _as_found(tower: VisionTower) -> Iterator[None]:
    """Run a block on the tower in evaluation mode, then put modes, flags and gradients back."""
    modes = {module: module.training for module in tower.modules()}
    flags = {parameter: (parameter.requires_grad, parameter.grad) for parameter in tower.parameters()}
    tower.eval().zero_grad(set_to_none=True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, (learns, gradient) in flags.items():
            parameter.requires_grad_(learns)
            parameter.grad = gradient


def _native(tower: VisionTower) -> tuple[int, int]:
    settings = tower.backbone.info.preprocess
    return settings.height, settings.width


def _pixels(
    tower: VisionTower, count: int = 2, size: tuple[int, int] | None = None
) -> Float[Tensor, "b 3 h w"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *(size or _native(tower)), generator=generator).to(tower.device)


def _facts_agree(tower: VisionTower) -> None:
    _expect(
        isinstance(tower.config, TowerConfig), f"config is a {type(tower.config).__name__}, not a TowerConfig"
    )
    _expect(
        str(tower.dtype) == f"torch.{tower.config.dtype}",
        f"dtype {tower.dtype}, config says {tower.config.dtype}",
    )
    rows, columns = tower.grid
    _expect(tower.num_patches == rows * columns, f"num_patches {tower.num_patches}, grid {tower.grid}")
    if rows == columns:
        sides = tower.num_patches_per_side
        _expect(sides == rows, f"num_patches_per_side {sides}, grid {tower.grid}")
    side = tower.image_processor.config.image_size
    _expect(side == tower.image_size, f"image_size {tower.image_size}, the image processor makes {side}")
    info = tower.backbone.info
    _expect(len(info.widths) == len(info.grids), f"{len(info.widths)} widths, {len(info.grids)} grids")
    _expect(
        -info.num_layers <= info.default_layer <= -1,
        f"default_layer {info.default_layer} of {info.num_layers}",
    )


def _every_selection_has_its_shape(tower: VisionTower) -> None:
    pixels = _pixels(tower)
    found: dict[Select, Tensor] = {}
    tokens: dict[Select, int] = {"patch": tower.num_patches}
    if tower.backbone.info.has_class_token:
        tokens |= {"cls_patch": tower.num_patches + 1, "cls": 1}
    if tower.config.keeps_head:
        tokens["pooled"] = 1
    pooled = tower.config.select == "pooled"
    patch_width = _with(tower, select="patch").hidden_size if pooled else tower.hidden_size
    for select, count in tokens.items():
        chosen = _with(tower, select=select)
        with torch.no_grad():
            found[select] = chosen(pixels)
        width = tower.embed_dim if select == "pooled" else patch_width
        shape, wanted = tuple(found[select].shape), (len(pixels), count, width)
        _expect(shape == wanted, f"select {select!r} gives {shape}, facts say {wanted}")
        _expect(
            found[select].dtype == tower.dtype,
            f"features are {found[select].dtype}, the tower is {tower.dtype}",
        )
        _expect(bool(found[select].isfinite().all()), f"select {select!r} gives values that are not finite")
    if "cls" in found:
        joined = torch.cat([found["cls"], found["patch"]], dim=1)
        _expect(
            torch.equal(found["cls_patch"], joined),
            "cls_patch is not the class token followed by the patches",
        )


def _with(tower: VisionTower, **changes: object) -> VisionTower:
    """The same weights, asked for something else; what the tower keeps stays kept."""
    kept = {"pooled_head": tower.config.keeps_head, "image_size": None}
    return VisionTower(tower.config.model_copy(update={**kept, **changes}), tower.backbone).eval()


def _other_sizes_run_or_are_refused(tower: VisionTower) -> None:
    """`interpolate` changes nothing at the native size, and a list of mixed sizes is each picture's own."""
    info, pixels = tower.backbone.info, _pixels(tower)
    patches = _with(tower, select="patch")
    with torch.no_grad():
        _expect(
            torch.equal(patches(pixels, interpolate=True), patches(pixels)),
            "interpolate=True changes features at the native size",
        )
        if info.size_step is None:
            return
        # The native size may be no multiple of the step, where a patch embedding drops the rest.
        steps_down, steps_across = (side // info.size_step for side in _native(tower))
        other = _pixels(tower, 1, ((steps_down + 1) * info.size_step, (steps_across + 2) * info.size_step))
        rows, columns = tower.grid
        count = (rows * (steps_down + 1) // steps_down) * (columns * (steps_across + 2) // steps_across)
        found = patches(other, interpolate=True)
        _expect(
            tuple(found.shape) == (1, count, patches.hidden_size),
            f"pixels of {list(other.shape)} give {list(found.shape)}, expected {count} patches",
        )
        mixed = patches([pixels[0], other[0], pixels[1]], interpolate=True)
        _expect(
            isinstance(mixed, list) and len(mixed) == 3, "a list of mixed sizes gives no list of features"
        )
        alone = (patches(pixels[:1])[0], found[0], patches(pixels[1:])[0])
        for one, own in zip(mixed, alone, strict=True):
            worst = float((one - own).abs().max() / own.abs().max())
            _expect(
                worst <= BATCH_TOLERANCE[tower.dtype], f"a picture among mixed sizes differs by {worst:.1e}"
            )


def _each_layer_is_itself(tower: VisionTower) -> None:
    """What a layer gives does not depend on which others are asked for."""
    pixels = _pixels(tower, 1).to(tower.dtype)
    reach, info = max(tower.layers), tower.backbone.info
    layers = sorted({1, *tower.layers, reach})
    with torch.no_grad():
        together = tower.backbone.forward_layers(pixels, layers)
        _expect(len(together) == len(layers), f"asked for {len(layers)} layers, got {len(together)}")
        for layer, output in zip(layers, together, strict=True):
            rows, columns = info.grids[layer - 1]
            wanted = (1, info.prefix_tokens + rows * columns, info.widths[layer - 1])
            _expect(
                tuple(output.shape) == wanted,
                f"layer {layer} gives {tuple(output.shape)}, info says {wanted}",
            )
            alone = tower.backbone.forward_layers(pixels, [layer])[0]
            _expect(
                torch.equal(alone, output), f"layer {layer} alone differs from layer {layer} among {layers}"
            )


def _evaluation_is_deterministic(tower: VisionTower) -> None:
    pixels = _pixels(tower)
    with torch.no_grad():
        _expect(torch.equal(tower(pixels), tower(pixels)), "two runs on the same pixels differ")


def _a_list_is_a_batch(tower: VisionTower) -> None:
    pixels = _pixels(tower)
    with torch.no_grad():
        _expect(
            torch.equal(tower(list(pixels)), tower(pixels)), "a list of pictures differs from the same batch"
        )


def _pictures_do_not_mix(tower: VisionTower) -> None:
    pixels = _pixels(tower, 3)
    with torch.no_grad():
        batch, alone = tower(pixels).float(), torch.cat([tower(picture[None]) for picture in pixels]).float()
    worst = float((batch - alone).abs().max() / batch.abs().max())
    tolerance = BATCH_TOLERANCE[tower.dtype]
    _expect(
        worst <= tolerance,
        f"a picture alone and in a batch differ by {worst:.1e} of the largest, over {tolerance:.0e}",
    )
    _expect(not torch.equal(batch[0], batch[1]), "different pictures give equal features")


def _wrong_pixels_are_refused(tower: VisionTower) -> None:
    height, width = _native(tower)
    for shape in ((1, 3, height + 1, width + 1), (1, 1, height, width), (3, height, width)):
        for interpolate in (False, True):
            try:
                tower(torch.zeros(shape, device=tower.device), interpolate=interpolate)
            except ConfigError:
                continue
            raise _BrokenError(f"pixels of shape {shape} are not refused with a ConfigError")


def _gradients_reach_pixels_and_parameters(tower: VisionTower) -> None:
    """Every parameter that learns gets a gradient from the patches: DDP waits for ever for one without."""
    pixels = _pixels(tower).requires_grad_()
    torch.autograd.backward(tower(pixels).float().square().sum())
    _expect(pixels.grad is not None and bool(pixels.grad.any()), "no gradient reaches the pixels")
    learning = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    if tower.config.keeps_head:  # the head is kept, and patches do not pass through it
        torch.autograd.backward(tower.pooled(pixels).float().square().sum())
    dead = [name for name, parameter in learning.items() if parameter.grad is None]
    _expect(not dead, f"{len(dead)} parameter(s) get no gradient: {', '.join(dead[:5])}")


def _frozen_means_no_graph(tower: VisionTower) -> None:
    tower.requires_grad_(False)
    _expect(not tower(_pixels(tower)).requires_grad, "features of a frozen tower carry a graph")


def _the_pooled_head_is_kept_or_refused(tower: VisionTower) -> None:
    pixels = _pixels(tower)
    if not tower.config.keeps_head:
        try:
            tower.pooled(pixels)
        except ConfigError:
            return
        raise _BrokenError("pooled() without pooled_head is not refused with a ConfigError")
    with torch.no_grad():
        pooled = tower.pooled(pixels)
    wanted = (len(pixels), tower.embed_dim)
    _expect(tuple(pooled.shape) == wanted, f"pooled() gives {tuple(pooled.shape)}, facts say {wanted}")


def _the_image_processor_makes_pixels(tower: VisionTower) -> None:
    height, width = _native(tower)
    pictures = [Image.new("RGB", (width + 7, height), (200, 30, 60)), Image.new("L", (17, 23), 90)]
    pixels = tower.image_processor(pictures)
    sizes = [tuple(picture.shape) for picture in pixels]
    step = tower.backbone.info.size_step
    if tower.image_processor.config.resize == "flexible" and step is not None:
        fits = all(rows % step == columns % step == 0 for _, rows, columns in sizes)
        _expect(fits, f"two pictures give {sizes}, which are no multiples of {step}")
    else:
        _expect(sizes == [(3, height, width)] * 2, f"two pictures give {sizes}")
    kinds = {picture.dtype for picture in pixels}
    _expect(kinds == {torch.float32}, f"pixels are {kinds}, not float32")


def _saving_and_loading_gives_the_same_tower(tower: VisionTower) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        tower.save_pretrained(first)
        others = [path.name for path in first.iterdir() if path.suffix not in SAVED_SUFFIXES]
        _expect(not others, f"besides JSON and safetensors it writes {', '.join(others)}")
        loaded = VisionTower.from_pretrained(first)
        _expect(not loaded.training, "a loaded tower is not in evaluation mode")
        loaded.to(tower.device).save_pretrained(second)
        for path in sorted(first.iterdir()):
            same = path.read_bytes() == (second / path.name).read_bytes()
            _expect(same, f"{path.name} changes when the loaded tower is saved again")
        own = ImageProcessor.from_pretrained(first).config
        _expect(own == tower.image_processor.config, "the image processor's settings change")
        kept = loaded.config.model_copy(update={"backbone": tower.config.backbone})
        _expect(kept == tower.config, f"the config changes from {tower.config} to {kept}")
        _expect(_same_tensors(tower, loaded), "weights change")
        with torch.no_grad():
            pixels = _pixels(tower)
            features, again = tower(pixels).float(), loaded(pixels).float()
        # The same weights lie elsewhere in memory, mapped from the file, and some CPUs' kernels then round
        # otherwise (CoAtNet on an AMD EPYC: 4.5e-7).
        worst = float((features - again).abs().max() / features.abs().max())
        _expect(worst <= BATCH_TOLERANCE[tower.dtype], f"features change by {worst:.1e} of the largest")


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


CLAUSES: tuple[Callable[[VisionTower], None], ...] = (
    _facts_agree,
    _every_selection_has_its_shape,
    _other_sizes_run_or_are_refused,
    _each_layer_is_itself,
    _evaluation_is_deterministic,
    _a_list_is_a_batch,
    _pictures_do_not_mix,
    _wrong_pixels_are_refused,
    _gradients_reach_pixels_and_parameters,
    _frozen_means_no_graph,
    _the_pooled_head_is_kept_or_refused,
    _the_image_processor_makes_pixels,
    _saving_and_loading_gives_the_same_tower,
)
