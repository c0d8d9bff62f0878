"""Weights of CLIP and SigLIP between the layouts of open_clip, OpenAI and transformers: exact, both ways.

open_clip's layout with the text tower under `text.` stands in the middle: a table of rows says which of its
tensors are which of transformers', and each row runs in both directions without touching a value. Facts of
the layouts: open_clip 3.3 `model.py`, `transformer.py`; timm 1.0 `AttentionPoolLatent`; transformers
`modeling_clip.py`, `modeling_siglip.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.weights import read_state_dict

Layout = Literal["open_clip", "open_clip_flat", "openai", "transformers"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Only OpenAI's own files carry these beside their tensors, and all of them use QuickGELU.
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")
# The text tower's tensors where open_clip's CLIP class unpacks it onto the model.
_FLAT_TEXT = re.compile(
    r"positional_embedding$|token_embedding\.|transformer\.resblocks\.|ln_final\.|text_projection(\.|$)|cls_emb$"
)
_FLAT_MARKS = re.compile(r"positional_embedding$|token_embedding\.|transformer\.resblocks\.|ln_final\.")
_TRANSFORMERS_MARKS = ("vision_model.", "text_model.", "embeddings.patch_embedding.", "visual_projection.")
# transformers 5 writes a vision model alone without the level that every older reader expects.
_WITHOUT_LEVEL = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")


def detect_layout(names: Collection[str]) -> Layout:
    """Which library's names these are.

    `open_clip` has the text tower under `text.`, or no text tower; `open_clip_flat` has it at the top level;
    `openai` is that with three constants; `transformers` is CLIP's or SigLIP's whole model, or vision part.

    Raises:
        WeightsError: names of no such layout, or of several.
    """
    marks: dict[Layout, list[str]] = {
        "open_clip": [name for name in names if name.startswith("text.")],
        "open_clip_flat": [name for name in names if _FLAT_MARKS.match(name)],
        "transformers": [name for name in names if name.startswith(_TRANSFORMERS_MARKS)],
    }
    visual = [name for name in names if name.startswith("visual.")]
    found = [layout for layout, marked in marks.items() if marked]
    if len(found) > 1 or (visual and marks["transformers"]):
        shown = [marks[layout][0] for layout in found] + visual[:1]
        raise WeightsError(f"these weights mix layouts: {', '.join(shown)}; a file has one model's names")
    if found == ["open_clip_flat"] and any(name in names for name in OPENAI_CONSTANTS):
        return "openai"
    if found or visual:
        return found[0] if found else "open_clip"
    shown = sorted(names)[:5]
    raise WeightsError(
        f"these weights are in no layout of CLIP or SigLIP that is known here ({', '.join(LAYOUTS)}); "
        f"their names: {', '.join(shown) or 'none'}{', ...' if len(names) > len(shown) else ''}"
    )


def convert(
    state: Mapping[str, Tensor], layout: Layout, *, quick_gelu: bool | None = None
) -> dict[str, Tensor]:
    """The same tensors under another layout's names, bit by bit; some are views of the given ones.

    There and back is the identity, but for `position_ids` that old transformers store: they are constants.
    Transformers' names come out with the `vision_model.` level, which each of its versions reads.

    Args:
        quick_gelu: whether the weights were trained with QuickGELU. OpenAI's layout means that they were, so
            only True goes there.

    Raises:
        WeightsError: names of no or of several layouts, a tensor that no row of the table knows, or a part
            of a fused tensor that is missing.
        ConfigError: a kind of model that the wanted layout cannot hold, with the reason.
    """
    found = detect_layout(state)
    if layout == "openai" and not quick_gelu:
        raise ConfigError(
            "OpenAI's layout means QuickGELU: convert to it with quick_gelu=True, or to another"
        )
    if found == layout != "transformers":
        return dict(state)
    if found == "transformers":
        state = _with_level(state)
        if layout == "transformers":
            return dict(state)
        ours = _apply({row.theirs: row for row in _table(state)}, state, "ours")
    else:
        ours = _nested(state) if found != "open_clip" else dict(state)
    if layout == "open_clip":
        return ours
    if layout == "transformers":
        _check_counterpart(ours)
        return _apply({row.ours: row for row in _table(ours)}, ours, "theirs")
    flat = _flat(ours)
    return flat if layout == "open_clip_flat" else {**flat, **_constants(flat)}


def counterpart(name: str, tensor: Tensor, names: Iterable[str]) -> dict[str, Tensor] | None:
    """One of open_clip's tensors under transformers' names: several where q, k and v are apart there.

    Args:
        name: in the `open_clip` layout.
        names: of the whole model, which tell its kind.

    Returns:
        None where transformers has none, or one that is joined with other tensors.
    """
    pattern, number = _numbered(name)
    row = next((row for row in _table(names) if row.ours == (pattern,)), None)
    if row is None:
        return None
    parts = zip(row.theirs, row.to_theirs([tensor]), strict=True)
    return {theirs.replace("#", number): part for theirs, part in parts}


def with_vision_level(name: str) -> str:
    """A name of transformers as its versions before 5 had it also in a vision model alone."""
    return f"vision_model.{name}" if name.startswith(_WITHOUT_LEVEL) else name


def read_converted(path: str | Path, layout: Layout) -> tuple[dict[str, Tensor], bool | None]:
    """Tensors of a weights file of any layout under the names of `layout`.

    Returns:
        The tensors, and whether they were trained with QuickGELU: OpenAI's layout, or a `config.json` or
        `open_clip_config.json` beside the file, tell; None where nothing does.

    Raises:
        WeightsError: as `read_state_dict` and `convert`.
        ConfigError: as `convert`.
    """
    path = Path(path)
    state = read_state_dict(path)
    try:
        found = detect_layout(state)
        quick_gelu = True if found == "openai" else _told_beside(path.parent, found)
        return convert(state, layout, quick_gelu=quick_gelu), quick_gelu
    except (ConfigError, WeightsError) as error:
        raise type(error)(f"{path}: {error}") from error


def _told_beside(folder: Path, layout: Layout) -> bool | None:
    name = "config.json" if layout == "transformers" else "open_clip_config.json"
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if layout != "transformers":
            return bool(content["model_cfg"].get("quick_gelu", False))
        family = content.get("model_type")
        if family not in ("clip", "clip_vision_model", "siglip", "siglip_vision_model"):
            return None
        # transformers 4 leaves out what is a default of the family.
        default = "quick_gelu" if family.startswith("clip") else "gelu_pytorch_tanh"
        vision = content.get("vision_config") or {} if family in ("clip", "siglip") else content
        return bool(vision.get("hidden_act", default) == "quick_gelu")
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"its {name} does not tell the activation: {error!r}") from error


_Parts = list[Tensor]


@dataclass(frozen=True)
class _Row:
    """Tensors of open_clip that are the same numbers as tensors of transformers; `#` is a block's number."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[[_Parts], _Parts] = list
    to_ours: Callable[[_Parts], _Parts] = list


def _transpose(parts: _Parts) -> _Parts:
    return [rearrange(parts[0], "rows columns -> columns rows").contiguous()]


def _thirds(parts: _Parts) -> _Parts:
    return list(parts[0].chunk(3))


def _third_and_rest(parts: _Parts) -> _Parts:
    width = len(parts[0]) // 3
    return [parts[0][:width], parts[0][width:]]


def _join(parts: _Parts) -> _Parts:
    return [torch.cat(parts)]


def _drop_batch(parts: _Parts) -> _Parts:
    return [rearrange(parts[0], "1 tokens width -> tokens width")]


def _add_batch(parts: _Parts) -> _Parts:
    return [rearrange(parts[0], "tokens width -> 1 tokens width")]


def _vector(parts: _Parts) -> _Parts:
    return [parts[0].reshape(1)]


def _scalar(parts: _Parts) -> _Parts:
    return [parts[0].reshape(())]


def _pairs(ours: str, theirs: str) -> list[_Row]:
    """A linear layer, norm or convolution under another name."""
    return [_Row((f"{ours}.{kind}",), (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]


def _blocks(
    ours: str, theirs: str, fused: str, out: str, norms: tuple[str, str], mlp: tuple[str, str]
) -> list[_Row]:
    """A transformer's blocks; `fused` and `.weight` or `_weight` is the joint projection to q, k and v."""
    separate = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
    rows = [
        _Row(
            (f"{ours}.{fused}{kind}",),
            tuple(f"{name}.{kind}" for name in separate),
            _thirds,
            _join,
        )
        for kind in ("weight", "bias")
    ]
    rows += _pairs(f"{ours}.{out}", f"{theirs}.self_attn.out_proj")
    for number, (norm, linear) in enumerate(zip(norms, mlp, strict=True), start=1):
        rows += _pairs(f"{ours}.{norm}", f"{theirs}.layer_norm{number}")
        rows += _pairs(f"{ours}.mlp.{linear}", f"{theirs}.mlp.fc{number}")
    return rows


def _native_blocks(ours: str, theirs: str) -> list[_Row]:
    return _blocks(ours, theirs, "attn.in_proj_", "attn.out_proj", ("ln_1", "ln_2"), ("c_fc", "c_proj"))


_TEXT = [
    _Row(("text.token_embedding.weight",), ("text_model.embeddings.token_embedding.weight",)),
    _Row(("text.positional_embedding",), ("text_model.embeddings.position_embedding.weight",)),
    *_native_blocks("text.transformer.resblocks.#", "text_model.encoder.layers.#"),
    *_pairs("text.ln_final", "text_model.final_layer_norm"),
]
_CLIP = (
    _Row(("visual.class_embedding",), ("vision_model.embeddings.class_embedding",)),
    _Row(("visual.conv1.weight",), ("vision_model.embeddings.patch_embedding.weight",)),
    _Row(("visual.positional_embedding",), ("vision_model.embeddings.position_embedding.weight",)),
    *_pairs("visual.ln_pre", "vision_model.pre_layrnorm"),
    *_native_blocks("visual.transformer.resblocks.#", "vision_model.encoder.layers.#"),
    *_pairs("visual.ln_post", "vision_model.post_layernorm"),
    _Row(("visual.proj",), ("visual_projection.weight",), _transpose, _transpose),
    *_TEXT,
    _Row(("text.text_projection",), ("text_projection.weight",), _transpose, _transpose),
    _Row(("logit_scale",), ("logit_scale",)),
    _Row(("logit_bias",), ("logit_bias",)),  # of one that was given SigLIP's loss; its classes take none
)
_POOL = "visual.trunk.attn_pool"
_HEAD = "vision_model.head"
_SIGLIP = (
    *_pairs("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    _Row(
        ("visual.trunk.pos_embed",),
        ("vision_model.embeddings.position_embedding.weight",),
        _drop_batch,
        _add_batch,
    ),
    *_blocks(
        "visual.trunk.blocks.#",
        "vision_model.encoder.layers.#",
        "attn.qkv.",
        "attn.proj",
        ("norm1", "norm2"),
        ("fc1", "fc2"),
    ),
    *_pairs("visual.trunk.norm", "vision_model.post_layernorm"),
    _Row((f"{_POOL}.latent",), (f"{_HEAD}.probe",)),
    *(
        _Row(
            (f"{_POOL}.q.{kind}", f"{_POOL}.kv.{kind}"),
            (f"{_HEAD}.attention.in_proj_{kind}",),
            _join,
            _third_and_rest,
        )
        for kind in ("weight", "bias")
    ),
    *_pairs(f"{_POOL}.proj", f"{_HEAD}.attention.out_proj"),
    *_pairs(f"{_POOL}.norm", f"{_HEAD}.layernorm"),
    *_pairs(f"{_POOL}.mlp.fc1", f"{_HEAD}.mlp.fc1"),
    *_pairs(f"{_POOL}.mlp.fc2", f"{_HEAD}.mlp.fc2"),
    *_TEXT,
    *_pairs("text.text_projection", "text_model.head"),
    _Row(("logit_scale",), ("logit_scale",), _vector, _scalar),
    _Row(("logit_bias",), ("logit_bias",), _vector, _scalar),
)
_SIGLIP_MARKS = (
    "visual.trunk.",
    "text.text_projection.",
    "vision_model.embeddings.patch_embedding.bias",
    "text_model.head.",
)
_NO_COUNTERPART = (
    (r"visual\.layer1\.", "a ModifiedResNet"),
    (r"text_decoder\.", "CoCa's decoder"),
    (r"visual\.attn_pool", "an attentional pool"),
    (r".*\.ls_[12]\.gamma", "layer scale"),
    (r"text\.cls_emb", "CoCa's class token of the text"),
    (r"text\.transformer\.(?!resblocks\.)", "a text tower from transformers"),
    (r"visual\.trunk\.(?!patch_embed\.|pos_embed$|blocks\.|norm\.|attn_pool\.)", "this trunk from timm"),
    (r"visual\.head\.", "a projection after timm's trunk"),
)


def _table(names: Iterable[str]) -> tuple[_Row, ...]:
    return _SIGLIP if any(name.startswith(_SIGLIP_MARKS) for name in names) else _CLIP


def _check_counterpart(names: Iterable[str]) -> None:
    for name in names:
        for pattern, what in _NO_COUNTERPART:
            if re.match(pattern, name):
                raise ConfigError(
                    f"transformers' CLIP and SigLIP have nothing like {what}, which {name!r} belongs to"
                )


def _apply(
    rows: Mapping[tuple[str, ...], _Row], state: Mapping[str, Tensor], direction: Literal["ours", "theirs"]
) -> dict[str, Tensor]:
    """Run a table's rows, keyed by the side that `state` has, to the other side."""
    key_of = {name: key for key in rows for name in key}
    groups: dict[tuple[tuple[str, ...], str], dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in state.items():
        pattern, number = _numbered(name)
        if pattern in key_of:
            groups.setdefault((key_of[pattern], number), {})[pattern] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{len(unknown)} tensor(s) belong to no part of a CLIP or SigLIP model: "
            f"{', '.join(sorted(unknown)[:5])}"
        )
    converted: dict[str, Tensor] = {}
    for (key, number), parts in groups.items():
        missing = [name.replace("#", number) for name in key if name not in parts]
        if missing:
            raise WeightsError(f"missing: {', '.join(missing)}, beside the parts that are there")
        row = rows[key]
        names, change = (row.theirs, row.to_theirs) if direction == "theirs" else (row.ours, row.to_ours)
        changed = change([parts[name] for name in key])
        converted |= {name.replace("#", number): part for name, part in zip(names, changed, strict=True)}
    return converted


def _numbered(name: str) -> tuple[str, str]:
    """A name with its block's number as `#`, and the number."""
    found = re.search(r"\.(\d+)\.", name)
    return (name, "") if found is None else (f"{name[: found.start()]}.#.{name[found.end() :]}", found[1])


def _with_level(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        with_vision_level(name): tensor
        for name, tensor in state.items()
        if not name.endswith("embeddings.position_ids")
    }


def _nested(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"text.{name}" if _FLAT_TEXT.match(name) else name: tensor
        for name, tensor in state.items()
        if name not in OPENAI_CONSTANTS
    }


def _flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = {}
    for name, tensor in state.items():
        inner = name.removeprefix("text.")
        if inner != name and not _FLAT_TEXT.match(inner):
            raise ConfigError(f"open_clip's flat layout has no place for {name!r}; keep the `text.` layout")
        flat[inner] = tensor
    return flat


def _constants(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's three constants, as the shapes tell them."""
    try:
        context, vocabulary = len(flat["positional_embedding"]), len(flat["token_embedding.weight"])
        if "visual.conv1.weight" in flat and "visual.positional_embedding" in flat:
            tokens, patch = len(flat["visual.positional_embedding"]), flat["visual.conv1.weight"].shape[-1]
        else:
            tokens, patch = len(flat["visual.attnpool.positional_embedding"]), 32
    except KeyError as error:
        raise ConfigError(f"OpenAI's layout holds whole CLIP models only; this one has no {error}") from None
    values = (math.isqrt(tokens - 1) * patch, context, vocabulary)
    return {name: torch.tensor(value) for name, value in zip(OPENAI_CONSTANTS, values, strict=True)}
