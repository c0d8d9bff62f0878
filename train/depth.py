"""Where in its tower a parameter is: what a VLM reads, blocks counted from the top, the last of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.tower import VisionTower
from vlm_vision.train.rules import base_name

_NUMBERED = re.compile(r"^(.*?\.(?:resblocks|layers|layer|blocks?|h|encoder\.block))\.(\d+)\.")


def read_by_vlm(model: DualEncoder) -> set[str]:
    """Names of the parameters that patch features depend on: those of a tower without its pooled head."""
    config = model.config.model_copy(update={"pooled_head": False, "select": "patch"})
    with torch.device("meta"):
        bare = VisionTower(config, config.backbone.build(load_weights=False))
    return {f"tower.{name}" for name, _ in bare.named_parameters()}


def changes_patches(model: DualEncoder) -> bool:
    """Whether a parameter that patch features depend on learns."""
    read = read_by_vlm(model)
    return any(p.requires_grad and base_name(name) in read for name, p in model.named_parameters())


def vision_blocks(model: DualEncoder) -> list[str]:
    """Names of the vision tower's blocks or stages, in order."""
    blocks = {id(block) for block in model.tower.backbone.layer_modules()}
    return [name for name, module in model.named_modules() if id(module) in blocks]


def text_blocks(model: DualEncoder) -> list[str]:
    """Names of the text tower's blocks, in order."""
    found = (_NUMBERED.match(name) for name, _ in model.named_parameters() if name.startswith("text."))
    return list(dict.fromkeys(f"{match[1]}.{match[2]}" for match in found if match))


def last_blocks(model: DualEncoder, count: int) -> list[str]:
    """Names of the last blocks of both towers."""
    return vision_blocks(model)[-count:] + text_blocks(model)[-count:]


def depths(model: DualEncoder) -> Mapping[str, int]:
    """Of every parameter, by its name without adapters, how many blocks are at or above it in its tower.

    0 for heads; the number of blocks and one more for embeddings (BEiT's layer-wise decay, arXiv:2106.08254).
    """
    read, found = read_by_vlm(model), {}
    sides = {"tower.": vision_blocks(model), "text.": text_blocks(model)}
    for name in (base_name(name) for name, _ in model.named_parameters()):
        blocks = next((blocks for side, blocks in sides.items() if name.startswith(side)), [])
        place = next((i for i, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        if place is not None:
            found[name] = len(blocks) - place
        else:
            is_below = "embed" in name.removeprefix("text.") if name.startswith("text.") else name in read
            found[name] = len(blocks) + 1 if is_below else 0
    return found


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a part that learns normalises by its batch, so that chunks of a batch are not the batch."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and any(parameter.requires_grad for parameter in module.parameters())
        for module in model.modules()
    )
