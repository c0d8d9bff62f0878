"""Weights between a model and the one tuned from it (WiSE-FT, arXiv:2109.01903), and the best mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError, WeightsError, nearest, require
from vlm_vision.progress import progress_bar


def merge(base: DualEncoder, tuned: DualEncoder, alpha: float) -> DualEncoder:
    """`tuned`, in place, with the weights `(1 - alpha) * base + alpha * tuned`, in evaluation mode.

    Every weight is mixed, the logarithm of the temperature too, in fp32 or better, and rounded to its own
    dtype. At 0 and 1 it is `base` and `tuned` to the bit. Whole numbers, which are counts, come from `tuned`.

    Raises:
        ConfigError: models of different architecture or preprocessing, or an alpha outside 0 to 1.
        WeightsError: weights of other names, shapes or dtypes.
    """
    check_mergeable(base, tuned)
    tuned.load_state_dict(mixed(base.state_dict(), tuned.state_dict(), alpha))
    return tuned.eval()


def mixed(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """New tensors `(1 - alpha) * base + alpha * tuned`; see `merge`."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be from 0 (the base) to 1 (the tuned model), not {alpha:g}")
    if alpha in (0, 1):
        return {name: tensor.clone() for name, tensor in (tuned if alpha else base).items()}
    return {name: _mix(base[name], tensor, alpha) for name, tensor in tuned.items()}


def check_mergeable(base: DualEncoder, tuned: DualEncoder) -> None:
    """Refuse two models between which no weights make sense; see `merge`."""
    differing = list(_differences(_settings(base), _settings(tuned)))
    if differing:
        raise ConfigError(
            "only a model and one tuned from it can be merged, and these two differ in "
            + "; ".join(f"{name} ({one!r}, {other!r})" for name, one, other in differing[:3])
        )
    ours, theirs = base.state_dict(), tuned.state_dict()
    strange = [f"{name} in one only" for name in sorted(ours.keys() ^ theirs.keys())]
    strange += [
        f"{name} of {_kind(ours[name])} and {_kind(theirs[name])}"
        for name in sorted(ours.keys() & theirs.keys())
        if _kind(ours[name]) != _kind(theirs[name])
    ]
    if strange:
        raise WeightsError(
            f"{len(strange)} weight(s) cannot be merged: {'; '.join(strange[:5])}"
            f"{'; ...' if len(strange) > 5 else ''}"
        )


def sweep(
    base: DualEncoder,
    tuned: DualEncoder,
    alphas: Sequence[float],
    score: Callable[[DualEncoder], Mapping[str, float]],
) -> dict[float, dict[str, float]]:
    """Scores of the mix at each alpha; `tuned` is as it was afterwards.

    Raises:
        ConfigError, WeightsError: as `merge`; no score.
    """
    check_mergeable(base, tuned)
    end = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    found: dict[float, dict[str, float]] = {}
    try:
        with progress_bar(len(alphas), "alphas") as bar:
            for alpha in alphas:
                tuned.load_state_dict(mixed(base.state_dict(), end, alpha))
                found[alpha] = dict(score(tuned))
                bar.update()
    finally:
        tuned.load_state_dict(end)
    if not any(found.values()):
        raise ConfigError("a sweep needs scores: name held-out data to score on")
    return found


def best_alpha(found: Mapping[float, Mapping[str, float]], by: str) -> float:
    """The alpha with the highest score of a name; of equal ones the smallest, which changes least.

    Raises:
        ConfigError: no such score.
    """
    names = next(iter(found.values()))
    if by not in names:
        raise ConfigError(f"no score is called {by!r}{nearest(by, names)} (scores: {', '.join(names)})")
    return max(sorted(found), key=lambda alpha: found[alpha][by])


def plot_sweep(found: Mapping[float, Mapping[str, float]], path: str | Path) -> None:
    """Every score over alpha, as a picture file.

    Raises:
        ConfigError: a suffix that names no kind of picture.
    """
    require("train", "matplotlib")
    figure = sweep_figure(found)
    kinds = figure.canvas.get_supported_filetypes()
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in kinds:
        raise ConfigError(f"{path}: a plot is one of {', '.join(sorted(kinds))}")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def sweep_figure(found: Mapping[float, Mapping[str, float]]) -> Any:
    """Every score over alpha, as a figure of matplotlib."""
    from matplotlib.figure import Figure

    alphas, names = sorted(found), list(next(iter(found.values())))
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for number, name in enumerate(names):
        values = [found[alpha][name] for alpha in alphas]
        axis.plot(alphas, values, marker="o", markersize=4, color=f"C{number % 10}", label=name)
    axis.set_xlabel("alpha: 0 is the base, 1 the tuned model")
    axis.set_ylabel("score")
    axis.grid(color="#e3e7ee", linewidth=0.7)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure


def _settings(model: DualEncoder) -> dict[str, Any]:
    """What decides what weights mean; its name does not, since the architecture is written out."""
    backbone = model.tower.backbone.portable_config()
    return {
        "backbone": backbone.model_dump(mode="json", exclude={"weights", "model"}),
        "pictures": model.image_processor.config.model_dump(mode="json"),
        "context_length": model.tokenizer.context_length,
    }


def _mix(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    if not tuned.is_floating_point():
        return tuned.clone()
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return torch.lerp(base.to(tuned.device, wide), tuned.to(wide), alpha).to(tuned.dtype)


def _differences(one: Any, other: Any, path: str = "") -> Any:
    """(path, one, other) of every leaf of two trees that differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path, one, other


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
