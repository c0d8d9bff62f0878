"""A model's README.md: what it is made of, the stages that made it, and the figures that its run knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_vision.config import read_yaml
from vlm_vision.train.vlm import PARTS, VisionLanguageModel

_USE = {
    "transformers": """\
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained(FOLDER)
model = AutoModelForImageTextToText.from_pretrained(FOLDER)
talk = [{"role": "user", "content": [
    {"type": "image", "url": "a.jpg"}, {"type": "text", "text": "What is in the picture?"}]}]
inputs = processor.apply_chat_template(
    talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
""",
    "llava": """\
from llava.model.builder import load_pretrained_model  # of LLaVA's repository

# The model's name must hold "llava"; the folder's own need not.
tokenizer, model, image_processor, context = load_pretrained_model(FOLDER, None, "llava")
""",
}
_PIPELINES = {"transformers": "transformers", "llava": "llava"}


def write_card(model: VisionLanguageModel, folder: Path, form: str, source: str | Path | None) -> None:
    """Write `folder/README.md`.

    Args:
        form: how it is loaded, `transformers` or `llava`.
        source: the folder that the model was loaded from; of a run, its stages are told.
    """
    stages = [] if source is None else run_stages(Path(source))
    (folder / "README.md").write_text(_card(model, form, stages), encoding="utf-8")


def run_stages(model_folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Config and figures of every finished stage of the run that left a model, in order; none elsewhere."""
    found = []
    for stage in finished_stages(model_folder):
        config = stage / "config.yaml"
        if config.is_file():
            record = json.loads((stage / "done.json").read_text(encoding="utf-8"))
            found.append((read_yaml(config), record["figures"]))
    return found


def finished_stages(model_folder: Path) -> list[Path]:
    """Folders of the finished stages of the run that left a model, in order; none elsewhere."""
    done = model_folder.absolute().parent.glob("*/done.json")
    return [path.parent for path in sorted(done, key=lambda path: path.stat().st_mtime_ns)]


def _card(model: VisionLanguageModel, form: str, stages: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    tower, projector, llm = model.vision_tower, model.projector, model.llm
    backbone = tower.backbone.portable_config()
    counts = {name: sum(p.numel() for p in model.part(name).parameters()) for name in PARTS}
    lines = [
        "---",
        f"library_name: {_PIPELINES[form]}",
        "pipeline_tag: image-text-to-text",
        "tags: [vlm_vision]",
        "---",
        "",
        "# A vision-language model of vlm_vision",
        "",
        "| part | what | parameters |",
        "|---|---|---|",
        f"| tower | {backbone.name}:{backbone.model or 'its own architecture'}, layer "
        f"{', '.join(map(str, tower.layers))} of {tower.backbone.info.num_layers}, "
        f"select {tower.config.select} | {counts['tower']:,} |",
        f"| projector | {projector.config.name}, {projector.in_features} to {projector.out_features} wide "
        f"| {counts['projector']:,} |",
        f"| language model | {type(llm).__name__} | {counts['llm']:,} |",
        "",
        _pictures(model),
        "",
        "```python",
        _USE[form].rstrip(),
        "```",
        "",
        "## Training",
        "",
    ]
    if not stages:
        lines.append(
            "The folder that this was exported from lies beside no run, so how it was trained is not known."
        )
    for config, figures in stages:
        lines += [
            f"### {config['name']}",
            "",
            *_data(config["data"]),
            "- learns: " + "; ".join(_rule(rule) for rule in config["learn"]),
            f"- peak learning rate {config['lr']}, batch {config['batch_size']}, {config['precision']}, "
            f"ZeRO-{config['zero_stage']}",
            "- figures: " + ", ".join(f"{name} {value}" for name, value in figures.items()),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _data(data: dict[str, Any] | list[dict[str, Any]]) -> list[str]:
    """A line for each source."""
    sources = data if isinstance(data, list) else [data]
    return [
        "- data: " + ", ".join(f"{name} {value}" for name, value in source.items() if value)
        for source in sources
    ]


def _pictures(model: VisionLanguageModel) -> str:
    settings = model.vision_tower.image_processor.config
    size = settings.image_size if isinstance(settings.image_size, int) else list(settings.image_size)
    tokens = model.tokens_per_image
    if model.tiles is None:
        return f"A picture of {size} pixels ({settings.resize}) takes {tokens} tokens."
    count = model.tiles.form.most_tiles
    return f"A picture in up to {count} tiles of {size} pixels takes up to {tokens} tokens, by its shape."


def _rule(rule: dict[str, Any]) -> str:
    return " ".join(f"{name} {value}" for name, value in rule.items() if value is not None)
