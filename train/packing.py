"""Several conversations in one row, none of which sees another: the loss of padded rows, without the padding.

Where a row holds several, its mask counts them, 1, 2, ..., with 0 for padding, and positions begin anew with
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from vlm_vision.errors import ConfigError


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Rows of places, of at most `size` tokens, so chosen that padded to the longest they take little room.

    Rows of several lengths are tried; each takes the longest first, into the first row with room. The room
    is never more than with one in a row. One that is longer than `size` has a row to itself.
    """
    total, longest = sum(lengths), max(lengths)
    sizes = {min(size, max(longest, -(-total // rows))) for rows in range(1, total // longest + 2)}
    layouts = [_first_fit(lengths, some) for some in sorted(sizes | {min(size, longest)})]

    def room(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(lengths[place] for place in row) for row in rows)

    return min(layouts, key=room)


def _first_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        fits = (row for row, free in enumerate(room) if free >= lengths[place])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append(size)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows


def attention_inputs(
    llm: Any, embeddings: Float[Tensor, "b t l"], segments: Int[Tensor, "b t"], positions: Int[Tensor, "b t"]
) -> dict[str, Any]:
    """What keeps the conversations of a row apart, for a model of transformers.

    Eager and SDPA attention take a block-diagonal causal mask, cut to the model's window where it has one; a
    model in which some layers have a window and some have none takes a mask for each kind. Flash attention
    takes one row in which transformers finds them by their positions, so there all rows are put behind each
    other.

    Raises:
        ConfigError: an attention that is none of these, or layers that see neither all nor a window.
    """
    kind = llm.config._attn_implementation
    if kind in ("eager", "sdpa"):
        windows = _windows(llm.config)
        masks = {name: block_diagonal(segments, embeddings.dtype, size) for name, size in windows.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": positions}
    if kind.startswith("flash_attention"):
        return one_row(embeddings, positions)
    raise ConfigError(f"packing: attention {kind!r} is not known to keep conversations apart; use sdpa")


def one_row(embeddings: Float[Tensor, "b t l"], positions: Int[Tensor, "b t"]) -> dict[str, Any]:
    """All rows behind each other; where positions begin anew, so does a conversation."""
    return {
        "inputs_embeds": rearrange(embeddings, "b t l -> 1 (b t) l"),
        "attention_mask": None,
        "position_ids": rearrange(positions, "b t -> 1 (b t)"),
    }


def _windows(config: Any) -> dict[str, int | None]:
    """By kind of layer, as transformers names them, how many tokens it sees; None sees all."""
    size = getattr(config, "sliding_window", None)
    every = ["full_attention"] if size is None else ["sliding_attention"]
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or every)
    known = {"full_attention": None, "sliding_attention": size}
    if strange := [kind for kind in kinds if kind not in known]:
        raise ConfigError(
            f"packing: layers of {strange[0]!r} are not known to keep conversations apart; leave packing out"
        )
    return {kind: known[kind] for kind in kinds}


def block_diagonal(
    segments: Int[Tensor, "b t"], dtype: torch.dtype, window: int | None = None
) -> Float[Tensor, "b 1 t t"]:
    """What is added to attention scores: 0 for the same conversation up to here, else the least number.

    Args:
        window: tokens that one sees, itself included, as transformers' `sliding_window`.
    """
    same = rearrange(segments, "b q -> b 1 q 1") == rearrange(segments, "b k -> b 1 1 k")
    seen = same & torch.ones(segments.shape[1:] * 2, dtype=torch.bool, device=segments.device).tril()
    if window is not None:
        seen &= ~torch.ones_like(seen[0, 0]).tril(-window)
    return torch.zeros(seen.shape, dtype=dtype, device=segments.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )
