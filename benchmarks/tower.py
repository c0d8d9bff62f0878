"""ViT-L/14-336: our tower against LLaVA's wrapper of CLIPVisionModel, and against its bare matrix products.

    python benchmarks/tower.py --dtype bfloat16

`wrapper` is LLaVA's own way: all hidden states, the last layer computed and dropped. `floor` is nothing but
the matrix products and the attention of the 23 layers that are asked for, with weights of their own, without
biases, norms or activations: what no implementation on these kernels can go below. All take turns in one
process; the median of the rounds counts, and the worst difference from the wrapper is printed first.
Memory is the peak over what weights and pixels take, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from vlm_vision import load_tower

WIDTH, MLP, LAYERS, HEADS, PATCH, SIDE = 1024, 4096, 24, 16, 14, 336
Way = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_mib(arguments.memory_of, arguments))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.weights = folder
        save_random_clip(Path(folder))
        compare(arguments)


@torch.inference_mode()
def compare(arguments: argparse.Namespace) -> None:
    device = device_of_this_machine()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {arguments.threads} thread(s)"
    print(f"ViT-L/14-336, batch {arguments.batch_size}, {arguments.dtype}, {name}, torch {torch.__version__}")
    pixels = pixels_for(arguments)
    ways = {name: WAYS[name](arguments) for name in WAYS}
    reference = ways["wrapper"](pixels).float()
    for name in ("tower", "tower, open_clip"):
        error = float((ways[name](pixels).float() - reference).abs().max() / reference.abs().max())
        print(f"{name}: differs from the wrapper by {error:.1e} of its largest feature")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            seconds[name].append(duration(way, pixels))
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    memory = {name: memory_of(name, arguments) for name in ways if name != "floor"}
    print(f"{'':18} {'seconds':>8} {'of wrapper':>11} {'of floor':>9} {'MiB':>7} {'of wrapper':>11}")
    for name in ways:
        ratios = [median[name] / median["wrapper"], median[name] / median["floor"]]
        line = f"{name:18} {median[name]:>8.3f} {ratios[0]:>11.2f} {ratios[1]:>9.2f}"
        if name in memory:
            line += f" {memory[name]:>7.0f} {memory[name] / memory['wrapper']:>11.2f}"
        print(line)


def device_of_this_machine() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pixels_for(arguments: argparse.Namespace) -> Tensor:
    pixels = torch.randn(arguments.batch_size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return pixels.to(device_of_this_machine(), getattr(torch, arguments.dtype))


def save_random_clip(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=768,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**size).save_pretrained(folder)


def wrapper(arguments: argparse.Namespace) -> Way:
    """The arithmetic of LLaVA's multimodal_encoder/clip_encoder.py, `mm_vision_select_layer` -2, `patch`."""
    model = CLIPVisionModel.from_pretrained(arguments.weights, dtype=getattr(torch, arguments.dtype))
    model = model.to(device_of_this_machine()).requires_grad_(False)

    def forward(pixels: Tensor) -> Tensor:
        hidden_states = model(pixels, output_hidden_states=True).hidden_states
        patches: Tensor = hidden_states[-2][:, 1:]
        return patches

    return forward


def tower(arguments: argparse.Namespace) -> Way:
    return load_tower(f"transformers:{arguments.weights}", dtype=arguments.dtype).to(device_of_this_machine())


def open_clip_tower(arguments: argparse.Namespace) -> Way:
    node = {"name": "open_clip", "model": "ViT-L-14-336-quickgelu", "weights": arguments.weights}
    return load_tower({"backbone": node}, dtype=arguments.dtype).to(device_of_this_machine())


class Floor(nn.Module):
    """The matrix products and attentions of the layers up to the one before the last."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (MLP, WIDTH), (WIDTH, MLP)]
        self.patches = nn.Parameter(0.02 * torch.randn(WIDTH, 3 * PATCH**2, dtype=dtype))
        self.layers = nn.ModuleList(
            nn.ParameterList(0.02 * torch.randn(shape, dtype=dtype) for shape in shapes)
            for _ in range(LAYERS - 1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
        tokens = functional.pad(functional.linear(patches, self.patches), (0, 0, 1, 0), value=0.1)
        result = tokens
        for qkv, out, up, down in self.layers:  # type: ignore[misc]
            parts = functional.linear(tokens, qkv).chunk(3, dim=-1)
            q, k, v = (rearrange(part, "b n (heads d) -> b heads n d", heads=HEADS) for part in parts)
            attended = functional.scaled_dot_product_attention(q, k, v)
            result = functional.linear(rearrange(attended, "b heads n d -> b n (heads d)"), out)
            # Each layer starts from the same tokens: without norms, values would grow from layer to layer.
            result = functional.linear(functional.linear(tokens, up), down)
        return result


def floor(arguments: argparse.Namespace) -> Way:
    return Floor(getattr(torch, arguments.dtype)).to(device_of_this_machine())


WAYS: dict[str, Callable[[argparse.Namespace], Way]] = {
    "wrapper": wrapper,
    "tower": tower,
    "tower, open_clip": open_clip_tower,
    "floor": floor,
}


def duration(way: Way, pixels: Tensor) -> float:
    synchronise()
    start = time.perf_counter()
    way(pixels)
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_of(name: str, arguments: argparse.Namespace) -> float:
    # Every tensor of a forward pass is then taken from the system, and given back when it is freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory-of", name, "--weights", arguments.weights]
    for option in ("dtype", "batch_size", "threads"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(told.stdout.splitlines()[-1])


@torch.inference_mode()
def peak_mib(name: str, arguments: argparse.Namespace) -> float:
    """What a forward pass takes at its peak over what is held before it."""
    way, pixels = WAYS[name](arguments), pixels_for(arguments)
    way(pixels)  # libraries take their own memory at their first call
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way(pixels)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = memory("VmHWM")
    way(pixels)
    return memory("VmHWM") - before


def memory(line: str) -> float:
    """MiB of this process, by a line of Linux's account of it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(each.split()[1]) for each in lines if each.startswith(line)) / 2**10


if __name__ == "__main__":
    main()
