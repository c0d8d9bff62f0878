"""Our towers beside LLaVA's own code, in a process of its own: both checkouts call their package `llava`.

    python llava_worker.py towers FOLDER    their CLIP tower: features, attributes
    python llava_worker.py arch FOLDER      llava_arch: vision modules, pictures of any size among the words
    python llava_worker.py evaluate MODEL   a trained model: loaded by their builder, an answer

The last line that it prints is JSON. With RECORD=FILE, `towers` writes there what theirs gave.
"""

from __future__ import annotations

import json
import os
import sys
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from integration.llava_parts import fill, picture, pixels, write_clip
from llava import mm_utils
from llava.mm_utils import process_anyres_image, process_images, tokenizer_image_token
from llava.model import llava_arch
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from torch import Tensor

import vlm_vision.integrations.llava  # noqa: F401 - after theirs, which it finds all the same

IS_NEXT = hasattr(mm_utils, "process_highres_image")
SELECTIONS = [(-2, "patch"), (-2, "cls_patch"), (-1, "patch"), (3, "patch")]
NEXT_SELECTIONS = [
    (-2, "slicefour_patch"),
    (-2, "slicefour_cls_patch"),
    (-2, "slice_m25811_f6_patch"),
    (-2, "slice_m25811_f6_cls_patch"),
]
MEMBERS = [
    "is_loaded",
    "select_layer",
    "select_feature",
    "hidden_size",
    "num_patches_per_side",
    "num_patches",
    "dtype",
    "device",
    "config.image_size",
    "config.patch_size",
    "config.hidden_size",
    "config.num_hidden_layers",
    "dummy_feature.shape",
    *(["image_size"] if IS_NEXT else []),
]
BEFORE_LOADING = [
    "is_loaded",
    "hidden_size",
    "num_patches_per_side",
    "config.image_size",
    "config.hidden_size",
]
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def facts(features: Tensor) -> dict[str, Any]:
    """What identifies features in a small file."""
    values = features.double()
    return {
        "shape": list(features.shape),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "first": values.flatten()[:4].tolist(),
        "last": values.flatten()[-4:].tolist(),
    }


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.abs().max())


def build(name: str, layer: int, feature: str, **options: Any) -> Any:
    settings = SimpleNamespace(
        mm_vision_tower=name, mm_vision_select_layer=layer, mm_vision_select_feature=feature
    )
    return llava_arch.build_vision_tower(settings, **options)


def members(names: list[str], towers: list[Any]) -> dict[str, list[str]]:
    """Of each name what ours gives, then what theirs gives, as text."""
    return {name: [str(attrgetter(name)(tower)) for tower in towers] for name in names}


def towers(folder: Path) -> dict[str, Any]:
    write_clip(folder / "clip")
    names = [f"vlm_vision:transformers:{folder / 'clip'}", str(folder / "clip")]
    results, recorded = {}, {}
    for layer, feature in SELECTIONS + (NEXT_SELECTIONS if IS_NEXT else []):
        pair = [build(name, layer, feature) for name in names]
        assert [type(tower).__name__ for tower in pair] == ["LlavaVisionTower", "CLIPVisionTower"]
        delayed = [build(name, layer, feature, delay_load=True) for name in names]
        before = members(BEFORE_LOADING, delayed)
        for tower in delayed:
            tower.load_model(device_map="cpu")
            tower.load_model()
        with torch.no_grad():
            ours, theirs = (tower(pixels()) for tower in pair)
            our_list, their_list = (tower(list(pixels(3))) for tower in pair)
            halves = [tower(pixels().bfloat16()) for tower in pair]
            late = delayed[0](pixels())
        results[f"{layer} {feature}"] = {
            "differences": {
                "tensor": worst(ours, theirs),
                "list": max(worst(own, row) for own, row in zip(our_list, their_list, strict=True)),
                "half": worst(*halves),
                "delayed": worst(late, theirs),
            },
            "members": members(MEMBERS, pair),
            "before loading": before,
            "frozen": not any(parameter.requires_grad for parameter in pair[0].parameters()),
        }
        recorded[f"{layer} {feature}"] = {
            "tensor": facts(theirs),
            "list": [list(row.shape) for row in their_list],
            "hidden_size": pair[1].hidden_size,
            "num_patches_per_side": pair[1].num_patches_per_side,
        }
    results["processor"] = processors([tower.image_processor for tower in pair])
    record(recorded)
    return results


def processors(pair: list[Any]) -> dict[str, Any]:
    """Every way in which pictures become pixels."""
    pictures = [picture(60, 40), picture(31, 57)]
    ways = {
        "preprocess": lambda processor: processor.preprocess(pictures, return_tensors="pt")["pixel_values"],
        "one": lambda processor: processor.preprocess(pictures[0], return_tensors="pt")["pixel_values"][0],
        "call": lambda processor: processor(pictures, return_tensors="pt")["pixel_values"],
        "video": lambda processor: processor.preprocess(
            np.stack([np.asarray(pictures[0])] * 2), return_tensors="pt"
        )["pixel_values"],
    }
    for mode in ("pad", "anyres", "square"):
        config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=PINPOINTS)
        ways[mode] = lambda processor, config=config: process_images(pictures[:1], processor, config)
    return {
        "differences": {name: worst(*(way(processor) for processor in pair)) for name, way in ways.items()},
        "members": members(["image_mean", "image_std", "size", "crop_size"], pair),
    }


def language_model(tower: str, merge: str) -> LlavaLlamaForCausalLM:
    """A Llama of width 16 with vision modules, all weights but the tower's by formula."""
    config = LlavaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_aspect_ratio="anyres" if merge != "flat" else "square",
        image_grid_pinpoints=PINPOINTS,
        mm_newline_position="grid",
    )
    model = LlavaLlamaForCausalLM(config).eval()
    arguments = SimpleNamespace(
        vision_tower=tower,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None,
        mm_patch_merge_type=merge,
        mm_projector_type="mlp2x_gelu",
        add_faster_video=False,
    )
    model.get_model().initialize_vision_modules(arguments)
    fill(model, leaving="vision_tower")
    return model


def arch(folder: Path) -> dict[str, Any]:
    write_clip(folder / "clip")
    results = {}
    ids = torch.tensor([[1, 5, -200, 7, 8, 9], [1, 6, 6, -200, 9, 3]])
    for merge in ("flat", "spatial", "spatial_unpad"):
        made = []
        for name in (f"vlm_vision:transformers:{folder / 'clip'}", str(folder / "clip")):
            model = language_model(name, merge)
            tower = model.get_vision_tower()
            sizes = [(60, 40), (32, 70)]
            images: Any = [
                process_anyres_image(picture(*size), tower.image_processor, PINPOINTS) for size in sizes
            ]
            if merge == "flat":
                images = torch.stack([image[0] for image in images])
            extra = {"modalities": ["image", "image"]} if IS_NEXT else {}
            with torch.no_grad():
                _, _, mask, _, embeddings, labels = model.prepare_inputs_labels_for_multimodal(
                    ids,
                    None,
                    torch.ones_like(ids),
                    None,
                    ids.clamp(min=0),
                    images,
                    image_sizes=sizes,
                    **extra,
                )
                logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
            made.append((embeddings, logits, labels, mask, model.config.mm_hidden_size))
        (embeddings, logits, labels, mask, width), theirs = made
        assert torch.equal(labels, theirs[2])
        assert torch.equal(mask, theirs[3])
        assert width == theirs[4]
        results[merge] = {
            "shape": list(embeddings.shape),
            "differences": {"embeddings": worst(embeddings, theirs[0]), "logits": worst(logits, theirs[1])},
        }
    return results


def record(recorded: dict[str, Any]) -> None:
    if "RECORD" in os.environ:
        path = Path(os.environ["RECORD"])
        whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        whole["LLaVA-NeXT" if IS_NEXT else "LLaVA"] = recorded
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def evaluate(folder: Path) -> dict[str, Any]:
    from llava.model.builder import load_pretrained_model
    from safetensors.torch import load_file

    if IS_NEXT:  # its builder sends the tower to CUDA unless the device map is `auto`
        options = {"device_map": "auto", "torch_dtype": "bfloat16", "attn_implementation": "sdpa"}
    else:
        options = {"device_map": "cpu", "device": "cpu"}
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), None, "llava_llama", **options)
    tower = model.get_vision_tower()
    saved = load_file(folder / "model.safetensors")
    same = all(
        torch.equal(value, saved[f"model.vision_tower.vision_tower.{name}"].to(value.dtype))
        for name, value in tower.vision_tower.state_dict().items()
    )
    model.float()  # half precision has no convolution on a CPU in torch 2.1
    images = process_images([picture(60, 40)], processor, model.config)
    prompt = "USER: <image>\nWhat colour is the picture? ASSISTANT:"
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    answers = [
        model.generate(ids, images=pictures, image_sizes=[(60, 40)], do_sample=False, max_new_tokens=8)[0]
        for pictures in (images, images)
    ]
    assert torch.equal(*answers)
    return {
        "tower": type(tower).__name__,
        "is_loaded": tower.is_loaded,
        "weights_are_the_checkpoints": same,
        "answer": tokenizer.decode(answers[0]),
        "tokens": len(answers[0]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, place = sys.argv[1], Path(sys.argv[2])
    outcome = {"towers": towers, "arch": arch, "evaluate": evaluate}[command](place)
    print(json.dumps(outcome))
