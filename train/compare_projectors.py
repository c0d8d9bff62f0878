"""Several projectors trained alike on the same kept features and language model: what each buys and costs."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlm_vision.errors import ConfigError, DataError, require
from vlm_vision.files import whole_file
from vlm_vision.tower import describe_tower
from vlm_vision.train.align import align
from vlm_vision.train.compare_config import CompareConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import answer_questions, caption_loss, vqa_accuracy
from vlm_vision.train.plan import check_fit
from vlm_vision.train.ranks import default_ranks, run_on_ranks
from vlm_vision.train.report import Report, style_axis
from vlm_vision.train.run import read_metrics
from vlm_vision.train.vlm import VisionLanguageModel, token_grid

RESULT_FILE = "result.json"


class Compared(NamedTuple):
    """A projector's figures, of all its seeds.

    Attributes:
        tokens: of a picture in the language model.
        parameters: of the projector.
        accuracy: share of held-out questions answered rightly, by seed.
        loss: mean over the tokens of held-out answers, by seed.
        seconds: of training, all stages, by seed.
    """

    label: str
    tokens: int
    parameters: int
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    seconds: tuple[float, ...]


def compare_projectors(
    config: CompareConfig, output: str | Path, *, ranks: int | None = None, resume: bool = False
) -> list[Compared]:
    """Train and score every projector with every seed, and write `comparison.json`, `.png` and `report.html`.

    The tower stays frozen, so its features are computed once and kept in `output/features`.

    Args:
        ranks: processes that share each training; None as in the demo.
        resume: keep what is finished, and continue what is not.

    Returns:
        One entry for each projector, in their order.

    Raises:
        ConfigError: a projector that does not fit, as `check_fit`; told before anything is trained.
        DataError: `output` holds an earlier comparison, or the data cannot be used.
    """
    require("align", "deepspeed", "matplotlib")
    output = Path(output)
    tower = describe_tower(config.model.tower)
    grid = token_grid(tower)
    for label in config.projectors:
        try:
            check_fit(config.run(label, config.seeds[0], ""))
        except ConfigError as error:
            raise ConfigError(f"projectors.{label}: {error}") from error
    runs = {(label, seed): output / f"{label}-{seed}" for label in config.projectors for seed in config.seeds}
    if not resume and any(folder.exists() for folder in runs.values()):
        raise DataError(f"{output} holds an earlier comparison: use --resume, or another output folder")
    questions = config.questions
    held_out = Conversations(
        questions.file, questions.image_folder, max_bad_share=questions.max_bad_share
    )  # read first: what is wrong with it shows before hours of training
    for number, ((label, seed), folder) in enumerate(runs.items(), start=1):
        if (folder / RESULT_FILE).is_file():
            continue
        print(f"\n{label}, seed {seed} ({number} of {len(runs)})")
        settings = config.run(label, seed, str(output / "features"))
        stages = run_on_ranks(ranks or default_ranks(), _aligned, settings, folder, resume)
        _score(config, held_out, folder, stages)
    compared = [_gather(config, label, grid, output) for label in config.projectors]
    _write(compared, config, output)
    return compared


def _aligned(config: Any, folder: Path, resume: bool) -> dict[str, dict[str, float]]:
    return align(config, folder, resume=resume)


def _score(config: CompareConfig, held_out: Conversations, folder: Path, stages: dict[str, Any]) -> None:
    """Score a finished model, write its `result.json`, and remove what the config does not keep."""
    model = VisionLanguageModel.from_pretrained(folder / "model")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    answers = answer_questions(model, held_out, max_new_tokens=config.questions.max_new_tokens)
    result = {
        "accuracy": vqa_accuracy(answers),
        "loss": caption_loss(model, held_out, max_length=config.stages[-1].max_length),
        "parameters": sum(parameter.numel() for parameter in model.projector.parameters()),
        "stages": stages,
    }
    with whole_file(folder / RESULT_FILE) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not config.keep_models:
        (folder / "model" / "projector").rename(folder / "projector")
        for part in [folder / "model", *folder.glob("*/model"), *folder.glob("*/checkpoints")]:
            shutil.rmtree(part)


def _gather(config: CompareConfig, label: str, grid: tuple[int, int], output: Path) -> Compared:
    results = [
        json.loads((output / f"{label}-{seed}" / RESULT_FILE).read_text(encoding="utf-8"))
        for seed in config.seeds
    ]
    return Compared(
        label,
        config.projectors[label].tokens_out(grid),
        results[0]["parameters"],
        tuple(result["accuracy"]["all"] for result in results),
        tuple(result["loss"] for result in results),
        tuple(sum(stage["seconds"] for stage in result["stages"].values()) for result in results),
    )


# What is written --------------------------------------------------------------------------------------------


def table(compared: Sequence[Compared]) -> Sequence[tuple[str, ...]]:
    """Rows of text, the head first: means over seeds, and the spread of the accuracy."""
    head = ("projector", "tokens", "parameters", "accuracy", "lowest..highest", "loss", "seconds")
    return [head] + [
        (
            row.label,
            f"{row.tokens:,}",
            f"{row.parameters:,}",
            f"{statistics.mean(row.accuracy):.3f}",
            f"{min(row.accuracy):.3f}..{max(row.accuracy):.3f}",
            f"{statistics.mean(row.loss):.3f}",
            f"{statistics.mean(row.seconds):.0f}",
        )
        for row in compared
    ]


def comparison_figure(compared: Sequence[Compared]) -> Any:
    """Accuracy against tokens, parameters and seconds, as a figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    costs: dict[str, list[float]] = {
        "tokens of a picture": [row.tokens for row in compared],
        "parameters": [row.parameters for row in compared],
        "seconds of training": [statistics.mean(row.seconds) for row in compared],
    }
    for axis, (name, values) in zip(axes, costs.items(), strict=True):
        for number, (row, value) in enumerate(zip(compared, values, strict=True)):
            colour, mean = f"C{number % 10}", statistics.mean(row.accuracy)
            axis.plot([value, value], [min(row.accuracy), max(row.accuracy)], color=colour, linewidth=1.2)
            marker = "os^D"[number // 10 % 4]
            axis.plot(value, mean, marker=marker, color=colour, linestyle="none", label=row.label)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlim(left=0)
        style_axis(axis, name)
    axes[0].set_ylabel("accuracy on held-out questions", fontsize=8, color="#5d6878")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right center")
    return figure


def _write(compared: Sequence[Compared], config: CompareConfig, output: Path) -> None:
    rows = [
        row._asdict() | {"projector": config.projectors[row.label].model_dump(mode="json")}
        for row in compared
    ]
    (output / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    figure = comparison_figure(compared)
    figure.savefig(output / "comparison.png", dpi=150)
    report = Report(
        "Projectors compared",
        "The same tower, kept features, language model, data and steps; only the projector differs. "
        f"Seeds: {', '.join(map(str, config.seeds))}.",
    )
    head, *body = table(compared)
    report.table(body, head)
    report.figure(figure)
    for row in compared:
        first = output / f"{row.label}-{config.seeds[0]}"
        report.heading(row.label)
        report.curves(
            {stage.name: read_metrics(first / stage.name / "metrics.jsonl") for stage in config.stages}
        )
    report.save(output / "report.html")
