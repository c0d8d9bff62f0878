"""The whole way on a small scale: scenes, contrastive training, tower, language model, alignment, answers.

Every stage is the code that ViT-L/14 and a 7B LLM take; only the configs are small.
"""

from __future__ import annotations

import json
import os
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlm_vision.config import Config, load_config
from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import DataError, require
from vlm_vision.preprocess import open_image
from vlm_vision.text_embeddings import embed_texts
from vlm_vision.tower import VisionTower
from vlm_vision.train.align import align
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.contrastive import train_contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.conversations import Conversations
from vlm_vision.train.evaluate import Answer, answer_questions, vqa_accuracy
from vlm_vision.train.held_out import embed_pictures
from vlm_vision.train.language import text_chats, warm_start_llm
from vlm_vision.train.language_config import LanguageConfig
from vlm_vision.train.pairs import Pairs
from vlm_vision.train.pairs_config import PairsConfig
from vlm_vision.train.ranks import default_ranks, run_on_ranks
from vlm_vision.train.report import Answered, PatchFeatures, Retrieval, write_report
from vlm_vision.train.run import PeakMemory, read_metrics, timed
from vlm_vision.train.scenes import SceneConfig, ScenePaths, write_scenes
from vlm_vision.train.vlm import VisionLanguageModel

C = TypeVar("C", bound=Config)

SHOWN_PICTURES, SHOWN_QUERIES, SHOWN_MAPS = 12, 5, 4
ANSWER_TOKENS = 8  # answers are one word; another generator's may be a few


def run_demo(output: str | Path, *, seed: int = 0, data: str | Path | None = None) -> dict[str, Any]:
    """Run every stage and write `metrics.json` and `report.html` into `output`.

    Args:
        seed: of the scenes and of every training.
        data: a folder with the files that `write_scenes` writes, made by another generator.

    Returns:
        What `metrics.json` holds.

    Raises:
        DataError: `output` holds an earlier run, or a file of `data` is missing.
    """
    require("align", "deepspeed", "datasets", "peft", "tensorboard", "matplotlib")
    output = Path(output)
    if (output / "metrics.json").exists() or (output / "clip").exists():
        raise DataError(f"{output} holds an earlier demo: remove it, or give another folder with --output")
    seconds: dict[str, float] = {}

    with PeakMemory() as memory:
        with timed(seconds, "scenes"):
            paths = _scenes(output / "data", seed, data)
        with timed(seconds, "contrastive"):
            clip_scores = _contrastive(paths, output, seed)
        with timed(seconds, "tower"):
            features = _tower(paths, output)
        with timed(seconds, "language"):
            _language(paths, output, seed)
        with timed(seconds, "align"):
            stages = _align(paths, output, seed)
        seconds |= {name: figures["seconds"] for name, figures in stages.items()}
        seconds["align"] -= sum(figures["seconds"] for figures in stages.values())  # what is not the steps
        with timed(seconds, "answers"):
            vqa_scores, shown = _answers(paths, output, seed)
        metrics: dict[str, Any] = {
            "zero_shot_top1": clip_scores["zero_shot_top1"],
            "retrieval_r1": clip_scores["text_to_image_r1"],
            **vqa_scores,
        }
        with timed(seconds, "report"):
            _report(paths, output, metrics, seconds, shown, features)
    metrics |= {"stage_seconds": seconds, "peak_memory_mb": round(memory.mb), "seed": seed}
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _print_table(metrics, output)
    return metrics


def shipped_config(config_class: type[C], name: str, overrides: list[str]) -> C:
    """One of the project's own configs, wherever the package is installed."""
    with as_file(files("vlm_vision.configs") / name) as path:
        return load_config(config_class, path, overrides)


def _scenes(folder: Path, seed: int, data: str | Path | None) -> ScenePaths:
    if data is None:
        return write_scenes(SceneConfig(seed=seed), folder)
    paths = ScenePaths(Path(data))
    wanted = (
        paths.train_csv,
        paths.val_csv,
        paths.classes_csv,
        paths.captions_json,
        paths.train_json,
        paths.val_json,
        paths.val_unseen_json,
    )
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        raise DataError(
            f"{data}: {', '.join(missing)} missing; the demo reads {', '.join(p.name for p in wanted)}"
        )
    for path in wanted:  # what is wrong with them shows now, before the first training
        if path.suffix == ".json":
            Conversations(path, paths.folder)
        else:
            caption = "label" if path == paths.classes_csv else "caption"
            Pairs(PairsConfig(path=str(path), caption_column=caption))
    return paths


def _contrastive(paths: ScenePaths, output: Path, seed: int) -> dict[str, float]:
    config = shipped_config(
        ContrastiveConfig,
        "demo_contrastive.yaml",
        [
            f"data.path={paths.train_csv}",
            f"validation.zero_shot.path={paths.classes_csv}",
            f"validation.retrieval.path={paths.val_csv}",
            f"seed={seed}",
        ],
    )
    scores: dict[str, float] = run_on_ranks(
        default_ranks(), train_contrastive, config, output / "contrastive"
    )
    os.rename(output / "contrastive" / "model", output / "clip")
    return scores


def _tower(paths: ScenePaths, output: Path) -> list[tuple[PatchFeatures, tuple[int, int]]]:
    """Save the tower by itself, load it back, and take patch features of a few pictures for the report."""
    VisionTower.from_pretrained(output / "clip", pooled_head=False).save_pretrained(output / "tower")
    tower = VisionTower.from_pretrained(output / "tower").eval()
    pairs = Pairs(PairsConfig(path=str(paths.val_csv)))
    pictures = [pairs.open(index) for index in range(SHOWN_MAPS)]
    with torch.inference_mode():
        patches = tower(tower.image_processor(pictures)).float().numpy()
    rows, columns = tower.grid
    centre = (rows // 2, columns // 2)
    return [
        (PatchFeatures(picture, patch, tower.grid), centre)
        for picture, patch in zip(pictures, patches, strict=True)
    ]


def _language(paths: ScenePaths, output: Path, seed: int) -> None:
    config = shipped_config(LanguageConfig, "demo_language.yaml", [f"seed={seed}"])
    chats = text_chats(json.loads(paths.train_json.read_text(encoding="utf-8")))
    pairs = Pairs(PairsConfig(path=str(paths.train_csv)))
    texts = [pairs.captions(index)[0] for index in range(len(pairs))]
    warm_start_llm(chats, texts, config, output / "llm")


def _align(paths: ScenePaths, output: Path, seed: int) -> dict[str, dict[str, float]]:
    folder = paths.folder.resolve()
    config = shipped_config(
        AlignConfig,
        "demo_align.yaml",
        [
            f"model.tower={output / 'tower'}",
            f"model.llm={output / 'llm'}",
            f"stages.0.data.file={paths.captions_json}",
            f"stages.0.data.image_folder={folder}",
            f"stages.1.data.file={paths.train_json}",
            f"stages.1.data.image_folder={folder}",
            f"seed={seed}",
        ],
    )
    figures: dict[str, dict[str, float]] = run_on_ranks(default_ranks(), align, config, output / "align")
    os.rename(output / "align" / "model", output / "model")
    return figures


def _answers(paths: ScenePaths, output: Path, seed: int) -> tuple[dict[str, Any], list[Answered]]:
    """Accuracy on held-out questions, with the right and with wrong pictures, and a few answers to show."""
    model = VisionLanguageModel.from_pretrained(output / "model")
    held_out = Conversations(paths.val_json, paths.folder)
    right = answer_questions(model, held_out, max_new_tokens=ANSWER_TOKENS, description="answer")
    wrong = answer_questions(
        model, held_out, max_new_tokens=ANSWER_TOKENS, swap_seed=seed, description="answer, wrong picture"
    )
    unseen = answer_questions(
        model,
        Conversations(paths.val_unseen_json, paths.folder),
        max_new_tokens=ANSWER_TOKENS,
        description="unseen pairs",
    )
    by_kind = vqa_accuracy(right)
    scores = {
        "vqa_accuracy": by_kind.pop("all"),
        "vqa_accuracy_wrong_image": vqa_accuracy(wrong)["all"],
        "vqa_accuracy_unseen_pairs": vqa_accuracy(unseen)["all"],
        "vqa_accuracy_by_kind": by_kind,
    }
    return scores, _shown(paths, right)


def _shown(paths: ScenePaths, answers: list[Answer]) -> list[Answered]:
    """The first pictures with all that was asked about them."""
    by_record: dict[str, list[Answer]] = {}
    for answer in answers:
        by_record.setdefault(answer.id, []).append(answer)
    return [
        Answered(
            open_image(paths.folder / group[0].images[0]),
            [(answer.question, answer.answer, answer.truth) for answer in group],
        )
        for group in list(by_record.values())[:SHOWN_PICTURES]
    ]


def _report(
    paths: ScenePaths,
    output: Path,
    metrics: dict[str, Any],
    seconds: dict[str, float],
    answers: list[Answered],
    patches: list[tuple[PatchFeatures, tuple[int, int]]],
) -> None:
    scores = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    runs = {
        "contrastive": output / "contrastive",
        "language model on text": output / "llm",
        "stage 1: projector": output / "align" / "stage1",
        "stage 2: projector and LLM": output / "align" / "stage2",
    }
    write_report(
        output / "report.html",
        title="From pictures with captions to answers",
        introduction="A small CLIP, its tower, a projector and a language model, trained one after the other "
        "on drawn scenes, and asked about pictures that none of them has seen.",
        metrics=scores
        | {f"accuracy, {kind}": value for kind, value in metrics["vqa_accuracy_by_kind"].items()},
        stage_seconds=seconds,
        curves={name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()},
        answers=answers,
        retrieval=_retrieval(paths, output),
        retrieval_queries=range(SHOWN_QUERIES),
        patches=patches,
    )


def _retrieval(paths: ScenePaths, output: Path) -> Retrieval:
    model = DualEncoder.from_pretrained(output / "clip").eval()
    pairs = Pairs(PairsConfig(path=str(paths.val_csv)))
    texts = [pairs.captions(index)[0] for index in range(len(pairs))]
    similarity = embed_texts(model, texts) @ embed_pictures(model, pairs).T
    return Retrieval(similarity.numpy(), texts, [pairs.open(index) for index in range(len(pairs))])


def _print_table(metrics: dict[str, Any], output: Path) -> None:
    print()
    for name in (
        "zero_shot_top1",
        "retrieval_r1",
        "vqa_accuracy",
        "vqa_accuracy_wrong_image",
        "vqa_accuracy_unseen_pairs",
    ):
        print(f"{name:28} {metrics[name]:.3f}")
    for name, value in metrics["stage_seconds"].items():
        print(f"{name + ' (s)':28} {value:.0f}")
    print(f"{'peak memory (MiB)':28} {metrics['peak_memory_mb']}")
    print(f"\nreport: {output / 'report.html'}")
