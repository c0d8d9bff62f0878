"""What each command of the command line does."""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_vision.errors import ConfigError, DataError, nearest, require
from vlm_vision.files import make_folder

if TYPE_CHECKING:
    from PIL import Image

    from vlm_vision.dual_encoder import DualEncoder
    from vlm_vision.text import Tokenizer
    from vlm_vision.tower import VisionTower
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.conversations_config import ConversationNode
    from vlm_vision.train.pairs_config import DataConfig
    from vlm_vision.train.validation_config import ValidationConfig
    from vlm_vision.train.vlm import VisionLanguageModel


def demo(arguments: argparse.Namespace) -> None:
    from vlm_vision.train.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, data=arguments.data)


def towers(arguments: argparse.Namespace) -> None:
    from vlm_vision.tower_config import BACKBONES

    action, *names = arguments.words or ["list"]
    if (action, len(names)) == ("show", 1):
        _show_tower(names[0])
        return
    if (action, len(names)) == ("new", 1):
        _new_plugin(names[0])
        return
    if action not in ("list", "verify") or (action == "list" and names):
        raise ConfigError(
            "towers lists all, shows one (towers show open_clip:ViT-L-14-336-quickgelu), verifies them "
            "(towers verify open_clip:ViT-B-32), or writes a plug-in (towers new my_backbone)"
        )
    if arguments.table is not None and action != "verify":
        raise ConfigError("--table is for towers verify")
    sources = BACKBONES.names()
    if arguments.source is not None and arguments.source not in sources:
        hint = nearest(arguments.source, sources)
        raise ConfigError(f"unknown source {arguments.source!r}{hint} (known: {', '.join(sources)})")
    if action == "list":
        _list_towers(arguments.source, arguments.match)
        return
    from vlm_vision.tower import list_backbones

    for name in [] if names else list_backbones():
        source, _, model = name.partition(":")
        if arguments.source in (None, source) and fnmatchcase(model, arguments.match):
            names.append(name)
    _verify_towers(arguments, names)


def projectors(arguments: argparse.Namespace) -> None:
    from vlm_vision.adapters.catalogue import UNKNOWN, facts_table, list_facts

    asked = arguments.in_features, arguments.out_features, arguments.grid
    if arguments.markdown:
        print(facts_table(*asked))
        return
    facts = list_facts(*asked)
    width = max(len(projector.name) for projector in facts)
    print(f"{'projector':{width}} {'tokens':>7} {'parameters':>14}  paper")
    for name, paper, _, _, *counts, _ in facts:
        tokens, parameters = (UNKNOWN if count is None else f"{count:,}" for count in counts)
        print(f"{name:{width}} {tokens:>7} {parameters:>14}  {paper}")
    for projector in facts:
        if projector.remark:
            print(projector.remark, file=sys.stderr)


def _list_towers(source: str | None, match: str) -> None:
    from vlm_vision.catalogue import UNKNOWN, TowerFacts, list_towers

    towers = list_towers(source, match)
    if not towers:
        raise ConfigError(f"no tower's name matches {match!r}; all names: vlm-vision towers")
    header = TowerFacts("source:model", *TowerFacts._fields[1:])
    widths = [max(map(len, column)) for column in zip(header, *towers, strict=True)]
    for name, *facts, licence in (header, *towers):
        columns = " ".join(fact.rjust(width) for fact, width in zip(facts, widths[1:], strict=False))
        print(f"{name.ljust(widths[0])} {columns} {licence}")
    bare = sum(tower.size == UNKNOWN for tower in towers)
    if bare:
        way_out = "vlm-vision towers show SOURCE:MODEL builds one, or says why it cannot"
        print(f"{bare} without facts: {way_out}", file=sys.stderr)


def _verify_towers(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    from vlm_vision.progress import progress_bar
    from vlm_vision.verify import TOLERANCE, can_verify, check_names, format_error, verify
    from vlm_vision.verify_page import VerifyPage, describe_run

    named = arguments.words[1:]
    command = ["vlm-vision", "towers", "verify", *named]
    if not named:
        command += ["--source", arguments.source] if arguments.source else []
        command += ["--match", arguments.match] if arguments.match != "*" else []
    check_names(named)
    alone = [name for name in names if not can_verify(name)]
    names = [name for name in dict.fromkeys(names) if name not in alone]
    if not names:
        raise ConfigError(
            f"no tower to verify ({', '.join(alone) or arguments.match}); see: vlm-vision towers"
        )
    run = describe_run(shlex.join(command))
    page = None if arguments.table is None else VerifyPage.read(Path(arguments.table))
    width = max(map(len, names))
    done = []
    with progress_bar(len(names), "verifying") as bar:
        tell = bar.write if sys.stderr.isatty() else partial(print, flush=True)
        tell(f"{'tower':{width}} {'patches':>8} {'pooled':>8} {'parameters':>14} {'seconds':>8}  verdict")
        for found in verify(names):
            patches, pooled = format_error(found.patches), format_error(found.pooled)
            parameters = "-" if found.facts is None else f"{found.facts.parameters:,}"
            tell(
                f"{found.name:{width}} {patches:>8} {pooled:>8} {parameters:>14} {found.seconds:>8.1f}  "
                f"{found.verdict}"
            )
            bar.update()
            done.append(found)
            if page is not None:
                page.add(found, run)
                page.write()
    counts = Counter(found.verdict.partition(" ")[0] for found in done)
    print(f"{len(done)} verified: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    for found in done:
        if not found.passed:
            print(f"{found.name}: {found.verdict}")
    for name in alone:
        print(f"{name}: has no other library to compare with")
    wrong = len(done) - counts["equal"] - counts["SKIPPED"]
    if wrong or not counts["equal"]:
        raise ConfigError(
            f"{wrong or len(done)} of {len(done)} towers could not be compared, or differ by more than "
            f"{TOLERANCE:.0e} of the largest value"
        )


def _show_tower(source: str) -> None:
    from vlm_vision.tower import describe_tower

    tower = describe_tower(source)
    info, settings = tower.backbone.info, tower.image_processor.config
    rows, columns = tower.grid
    facts = {
        "hidden size": tower.hidden_size,
        "patches": f"{tower.num_patches} ({rows} x {columns}, every {tower.patch_size} pixels)",
        "image size": tower.image_size,
        "other sizes": _other_sizes(source, tower),
        "layers": f"{info.num_layers}, of which {', '.join(map(str, tower.layers))} given",
        "select": tower.config.select,
        "prefix tokens": info.prefix_tokens,
        "parameters": f"{tower.num_parameters:,} (up to the layer given)",
        "pooled head": f"{info.embed_dim} channels" if info.embed_dim else "none",
        "resize": f"{settings.resize}, {settings.interpolation}",
        "mean, std": f"{settings.mean}, {settings.std}",
    }
    for name, value in facts.items():
        print(f"{name:14} {value}")
    for assumption in info.assumptions:
        print(f"{'assumed':14} {assumption}")


def _other_sizes(source: str, tower: VisionTower) -> str:
    """Which pictures a tower takes beside those of its native size."""
    from vlm_vision.tower import describe_tower

    info = tower.backbone.info
    if info.size_step is not None:
        return f"multiples of {info.size_step} pixels, per call or at load"
    try:
        describe_tower(source, image_size=(2 * info.preprocess.height, 2 * info.preprocess.width))
    except ConfigError:
        return "none"
    return "at load only"


def _new_plugin(folder: str) -> None:
    from vlm_vision.plugin import write_plugin

    print(*write_plugin(folder), sep="\n")
    print(f"now: pip install -e {folder}")
    print(f"     python -m pytest {folder}")
    print(f"     vlm-vision towers show {Path(folder).name}:small")


def features(arguments: argparse.Namespace) -> None:
    from vlm_vision.extract import extract_features, extract_file
    from vlm_vision.picture_list import expand_sources
    from vlm_vision.tower import load_tower

    output, pooled = Path(arguments.output), arguments.select == "pooled"
    is_file = output.suffix == ".safetensors" and not output.is_dir()
    for_folders = {name: getattr(arguments, name) for name in ("format", "shard_size", "max_bad_share")}
    for_folders = {name: value for name, value in for_folders.items() if value is not None}
    if is_file and for_folders:
        option = "--" + next(iter(for_folders)).replace("_", "-")
        raise ConfigError(f"{option} is for a folder, and {output} is one file: give -o a folder")
    if output.suffix == ".parquet":
        raise ConfigError(f"{output}: parquet files are written into a folder: -o FOLDER --format parquet")
    if pooled and arguments.layer is not None:
        raise ConfigError("--select pooled is of the whole model: give no --layer")
    sources = expand_sources(arguments.pictures)
    asked = {name: getattr(arguments, name) for name in ("layer", "select", "dtype")}
    if pooled:
        asked |= {"select": None, "pooled_head": True}
    tower = load_tower(
        arguments.source, **{name: value for name, value in asked.items() if value is not None}
    )
    options = {name: getattr(arguments, name) for name in ("batch_size", "workers")}
    options |= {"tower_name": arguments.source, "pooled": pooled}
    if is_file:
        tensor = extract_file(tower, sources, output, **options)
        print(f"{output}: features {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        return
    done = extract_features(tower, sources, output, **options, **for_folders)
    if done is None:  # another process tells
        return
    speed = f"; went through {done.new:,}, {done.new / done.seconds:,.1f} a second" if done.new else ""
    print(
        f"{output}: features {list(done.manifest.shape)} {done.manifest.dtype} of {done.pictures:,} pictures "
        f"in {done.manifest.shards:,} {done.manifest.format} shard(s){speed}"
    )
    if done.bad:
        print(
            f"{done.bad:,} left out, listed in {output / 'bad_pictures.jsonl'}; "
            "to try them again, delete the shards it names and run the command again"
        )


def export(arguments: argparse.Namespace) -> None:
    from vlm_vision.adapters import load_adapter
    from vlm_vision.dual_encoder import load_dual_encoder
    from vlm_vision.export import export_clip, export_open_clip, export_transformers, load_whole_tower
    from vlm_vision.train.vlm_folder import is_vlm_folder

    output = Path(arguments.output)
    if output.exists():
        raise ConfigError(f"{output} is there already: give another folder")
    if arguments.to == "llava" or (arguments.to == "transformers" and is_vlm_folder(arguments.source)):
        _export_vlm(arguments, output)
        return
    if arguments.lora == "apart":
        raise ConfigError("--lora apart is of a vision-language model, --to transformers or llava")
    if arguments.to in ("open_clip", "transformers"):
        model = load_dual_encoder(arguments.source)
        if arguments.adapter is not None:
            load_adapter(model, arguments.adapter)
        if arguments.to == "transformers":
            name = export_transformers(model, output)
            print(f"{output}: transformers.{name}.from_pretrained, and AutoProcessor.from_pretrained")
            return
        export_open_clip(model, output)
        print(f"{output}: open_clip.create_model_and_transforms('local-dir:{output}')")
        return
    tower = load_whole_tower(arguments.source)
    if arguments.adapter is not None:
        load_adapter(tower, arguments.adapter)
    written = export_clip(tower, output)
    print(f"{output}: CLIPVisionModel of {written.layers} layers")
    if written.placeholders:
        print(
            f"  the tower had freed its last {len(written.placeholders)} layer(s): they are zeros, which "
            "change nothing, so that layers are counted as before"
        )
    if not written.has_pooled:
        print("  its pooled output is zeros, for the same reason; features of patches are complete")
    layers = " and ".join(map(str, written.select_layers))
    print(f"  LLaVA: --vision_tower {output} --mm_vision_select_layer {layers}")


def _export_vlm(arguments: argparse.Namespace, output: Path) -> None:
    from vlm_vision.train.vlm import VisionLanguageModel
    from vlm_vision.train.vlm_export import LORA_FOLDER, export_llava, export_llava_for_transformers
    from vlm_vision.train.vlm_lora import take_lora_apart

    if arguments.adapter is not None:
        raise ConfigError(
            "--adapter is merged into towers and dual encoders; stages merge what they trained before saving"
        )
    model = VisionLanguageModel.from_pretrained(arguments.source)
    lora = take_lora_apart(model, arguments.source) if arguments.lora == "apart" else None
    if arguments.to == "transformers":
        export_llava_for_transformers(model, output, source=arguments.source, lora=lora)
        kind = "Llava" if model.tiles is None else "LlavaNext"
        print(f"{output}: transformers.{kind}ForConditionalGeneration.from_pretrained, and AutoProcessor")
        layers = len(model.vision_tower.layers)
        vllm_loads = model.tiles is not None or layers == 1
        if not vllm_loads:
            print(f"  vLLM does not load it: its Llava reads one layer of the tower, not {layers}")
        if lora is not None:
            vllm = ", vLLM's --lora-modules" if vllm_loads and not lora.settings["use_dora"] else ""
            print(f"{output / LORA_FOLDER}: peft.PeftModel.from_pretrained(model, ...){vllm}")
        return
    export_llava(model, output, source=arguments.source, lora=lora)
    base, name = (None, "llava") if lora is None else (lora.settings["base_model_name_or_path"], "llava-lora")
    print(f"{output}: LLaVA's load_pretrained_model({str(output)!r}, {base!r}, {name!r})")
    print(f"  its tower is {output.absolute() / 'vision_tower'}; after a move, change mm_vision_tower")


def data(arguments: argparse.Namespace) -> None:
    checks = arguments.action == "check"
    if checks and arguments.output is not None:
        make_folder(arguments.output)  # before the data is read
    if checks and arguments.shard_size is not None:
        raise ConfigError("--shard-size is for data pack")
    talks = _conversations_of(arguments)
    if talks is not None:
        _check_conversations(arguments, talks)
        return
    if not checks and arguments.output is None:
        raise ConfigError("data pack needs a folder for the tars: -o FOLDER")
    config, tokenizer = _data_of(arguments)
    workers = (os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    if not checks:
        from vlm_vision.train.data_pack import SHARD_SIZE, pack_data

        size = arguments.shard_size or SHARD_SIZE
        packed = pack_data(config, arguments.output, shard_size=size, workers=workers)
        print(f"{arguments.output}: {packed.samples:,} samples in {packed.shards:,} tar(s)")
        if packed.bad:
            listed = Path(arguments.output) / "bad_samples.jsonl"
            print(f"{packed.bad:,} rows or samples left out, listed in {listed}")
        return
    from vlm_vision.train.data_check import check_data, write_findings

    findings = check_data(config, tokenizer=tokenizer(), workers=workers)
    _tell_findings(findings)
    if arguments.output is not None:
        write_findings(findings, arguments.output, f"Data: {arguments.source}")
        print(f"report: {Path(arguments.output) / 'report.html'}")
    _refuse_bad(findings)


def _tell_findings(findings: Any) -> None:
    for name, value in findings.table.items():
        print(f"{name:42} {value}")
    for reason in findings.bad[:5]:
        print(f"bad: {reason}")


def _refuse_bad(findings: Any) -> None:
    if len(findings.bad) > findings.allowed:
        raise DataError(
            f"{len(findings.bad):,} rows or samples are bad, max_bad_share allows {findings.allowed:,}: "
            "mend them, or raise it"
        )


def _conversations_of(arguments: argparse.Namespace) -> AlignConfig | ConversationNode | None:
    """The conversations that a command line names; None where it names pictures with captions."""
    from vlm_vision.config import read_yaml, validate
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.conversations_config import ConversationNode
    from vlm_vision.train.record_files import holds_conversations

    source = arguments.source
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        tree = read_yaml(Path(source))
        if "stages" in tree:
            return validate(AlignConfig, tree, source)
        nodes = tree.get("data")
        first = nodes[0] if isinstance(nodes, list) and nodes else nodes
        if not (isinstance(first, dict) and "file" in first):
            return None
        return validate(ConversationNode, {"data": nodes}, source)
    if not holds_conversations(source):
        return None
    given = {name: getattr(arguments, name) for name in ("image_folder", "max_bad_share")}
    node = {"file": source, **{name: value for name, value in given.items() if value is not None}}
    if Path(source).exists():  # as of a table
        node.setdefault("image_folder", str(Path(source) if Path(source).is_dir() else Path(source).parent))
    return validate(ConversationNode, {"data": node}, "the command line")


def _check_conversations(arguments: argparse.Namespace, talks: AlignConfig | ConversationNode) -> None:
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.chat_format import ChatFormat, read_template
    from vlm_vision.train.conversation_check import check_conversations, write_conversation_findings
    from vlm_vision.train.plan import picture_tokens
    from vlm_vision.train.vlm import load_tokenizer

    if arguments.action != "check":
        raise ConfigError(f"{arguments.source}: data pack writes tars of pictures with captions alone")
    workers = (os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    options = ("tokenizer", "chat_template", "tokens_per_image", "max_length")
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    if isinstance(talks, AlignConfig):
        if given:
            option = "--" + next(iter(given)).replace("_", "-")
            raise ConfigError(f"{option}: {arguments.source} says it; change it there")
        model = talks.model
        parts = [
            (f"stage {stage.name!r}", stage.data, model.llm, stage.chat_template or model.chat_template,
             stage.max_length, stage.name, picture_tokens(talks.model_of(stage))) for stage in talks.stages
        ]  # fmt: skip
    else:
        tokenizer, template = arguments.tokenizer, arguments.chat_template
        if given and (tokenizer is None or arguments.tokens_per_image is None):
            raise ConfigError("to count tokens, give both --tokenizer and --tokens-per-image")
        image_tokens = arguments.tokens_per_image or 1
        parts = [
            ("", talks.data, tokenizer, template, arguments.max_length or 2048, "", (image_tokens, None))
        ]
    found = []
    for title, data, tokenizer, template, max_length, folder, (image_tokens, tiles) in parts:
        chat = None
        if tokenizer is not None:
            text = None if template is None else read_template(template)
            chat = ChatFormat(load_tokenizer(tokenizer, text), None if tiles else image_tokens)
        findings = check_conversations(data, chat=chat, max_length=max_length, workers=workers, tiles=tiles)
        if title:
            print(title)
        _tell_findings(findings)
        if arguments.output is not None:
            output = Path(arguments.output) / folder
            write_conversation_findings(findings, output, f"Data: {title or arguments.source}")
            print(f"report: {output / 'report.html'}")
        found.append(findings)
    for findings in found:
        _refuse_bad(findings)


def _data_of(arguments: argparse.Namespace) -> tuple[DataConfig, Callable[[], Tokenizer]]:
    """The sources that a command line names, and the tokenizer of the model that is to read them."""
    from vlm_vision.config import read_yaml, validate
    from vlm_vision.text import OpenClipTokenizer
    from vlm_vision.train.pairs_config import DataNode, PairsConfig

    names = ("image_column", "caption_column", "negative_column", "image_folder", "max_bad_share")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if Path(arguments.source).suffix.lower() not in (".yaml", ".yml"):
        config = validate(PairsConfig, {"path": arguments.source, **given}, "the command line")
        return config, lambda: OpenClipTokenizer({})
    if given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ConfigError(f"{option}: {arguments.source} says it in its data node; change it there")
    tree = read_yaml(Path(arguments.source))
    if "data" not in tree:
        raise ConfigError(f"{arguments.source}: has no data node (it has: {', '.join(tree)})")
    node = validate(DataNode, {"data": tree["data"]}, arguments.source).data
    return node, lambda: _tokenizer_of(tree["model"]) if "model" in tree else OpenClipTokenizer({})


def _tokenizer_of(model: Any) -> Tokenizer:
    from vlm_vision.dual_encoder import describe_dual_encoder

    return describe_dual_encoder(model).tokenizer


def contrastive(arguments: argparse.Namespace) -> None:
    from vlm_vision.config import load_config
    from vlm_vision.train.contrastive import train_contrastive
    from vlm_vision.train.contrastive_config import ContrastiveConfig

    overrides = [*arguments.overrides, *(["for_vlm=true"] if arguments.for_vlm else [])]
    config = load_config(ContrastiveConfig, arguments.config, overrides)
    output = _run_folder(arguments)
    scores = train_contrastive(config, output, resume=arguments.resume)
    _print_scores({"": scores}, output)


def align(arguments: argparse.Namespace) -> None:
    from vlm_vision.config import load_config
    from vlm_vision.train.align import align as run_stages
    from vlm_vision.train.align_config import AlignConfig

    config = load_config(AlignConfig, arguments.config, arguments.overrides)
    output = _run_folder(arguments)
    figures = run_stages(config, output, resume=arguments.resume)
    _print_scores({f"stage {name!r}": scores for name, scores in figures.items()}, output)


def compare_projectors(arguments: argparse.Namespace) -> None:
    from vlm_vision.config import load_config
    from vlm_vision.train import compare_projectors as comparison
    from vlm_vision.train.compare_config import CompareConfig

    config = load_config(CompareConfig, arguments.config, arguments.overrides)
    output = _run_folder(arguments)
    compared = comparison.compare_projectors(config, output, ranks=arguments.ranks, resume=arguments.resume)
    print()
    for label, *figures in comparison.table(compared):
        print(f"{label:24}" + "".join(f"{figure:>17}" for figure in figures))
    print(f"report: {output / 'report.html'}")


def qformer(arguments: argparse.Namespace) -> None:
    from vlm_vision.config import load_config
    from vlm_vision.train.representation_config import RepresentationConfig
    from vlm_vision.train.representation_stage import train_representation

    config = load_config(RepresentationConfig, arguments.config, arguments.overrides)
    output = _run_folder(arguments)
    scores = train_representation(config, output, resume=arguments.resume)
    _print_scores({"": scores}, output, "projector")


def chat(arguments: argparse.Namespace) -> None:
    from vlm_vision.preprocess import open_image
    from vlm_vision.train.vlm import VisionLanguageModel

    if arguments.web:
        require("app", "gradio")
    elif arguments.image is None:
        raise ConfigError("chat needs a picture to talk about: --image FILE, or --web to choose it on a page")
    if arguments.question is not None and not arguments.question.strip():
        raise DataError("the question is empty")
    image = None if arguments.image is None else open_image(arguments.image)
    model = VisionLanguageModel.from_pretrained(arguments.model)
    if arguments.web:
        _serve(model, arguments.max_new_tokens)
        return
    asked = _typed_questions() if arguments.question is None else iter([arguments.question])
    for answer in _conversation(model, image, asked, arguments.max_new_tokens):
        for piece in answer:
            print(piece, end="", flush=True)
        print()


def _conversation(
    model: VisionLanguageModel, image: Image.Image | None, questions: Iterator[str], max_new_tokens: int
) -> Iterator[Iterator[str]]:
    """Answers to questions about a picture, piece by piece, each with what was said before in mind."""
    from vlm_vision.train.conversations import IMAGE_TOKEN, Turn

    pixels, sizes = model.prepare_pictures([] if image is None else [image])
    turns: list[Turn] = []
    for question in questions:
        mark = "" if turns or image is None else f"{IMAGE_TOKEN}\n"
        turns.append(Turn("user", mark + question))
        said: list[str] = []
        yield _noting(model.stream(pixels, turns, max_new_tokens, image_sizes=sizes), said)
        turns.append(Turn("assistant", "".join(said)))


def _noting(pieces: Iterator[str], said: list[str]) -> Iterator[str]:
    for piece in pieces:
        said.append(piece)
        yield piece


def _typed_questions() -> Iterator[str]:
    print("Ask about the picture; an empty line ends.")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def _serve(model: VisionLanguageModel, max_new_tokens: int) -> None:
    import gradio

    from vlm_vision.preprocess import open_image

    def answer(image: Any, question: str) -> Iterator[str]:
        try:
            if not question.strip():
                raise DataError("the question is empty")
            opened = None if image is None else open_image(image)
            yield from accumulate(next(_conversation(model, opened, iter([question]), max_new_tokens)))
        except DataError as error:
            raise gradio.Error(str(error)) from error

    gradio.Interface(
        answer,
        inputs=[gradio.Image(type="filepath", label="Picture"), gradio.Textbox(label="Question")],
        outputs=gradio.Textbox(label="Answer"),
        title="vlm_vision",
        flagging_mode="never",
    ).launch()


def eval(arguments: argparse.Namespace) -> None:
    import torch

    from vlm_vision.train.examine import examine, write_examination
    from vlm_vision.train.questions import Questions
    from vlm_vision.train.vlm import VisionLanguageModel

    questions = Questions(arguments.questions, arguments.images, kind=arguments.kind, prompt=arguments.prompt)
    if arguments.output is not None:
        make_folder(arguments.output)  # before the questions are answered
    model = VisionLanguageModel.from_pretrained(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found = examine(
        model, questions, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens
    )
    print(f"{questions.kind}: {len(questions):,} questions, each score with its 95 % interval")
    rows = found.table()
    width = max(len(category) for category, _, _ in rows)
    for category, name, score in rows:
        print(f"{category:{width}} {name:10} {score}")
    if arguments.output is not None:
        about = {"model": arguments.model}
        print(f"report: {write_examination(found, questions, arguments.output, about)}")


def zero_shot(arguments: argparse.Namespace) -> None:
    from vlm_vision.dual_encoder import load_dual_encoder
    from vlm_vision.picture_list import list_files
    from vlm_vision.prompts import TEMPLATES as NAMED
    from vlm_vision.text_embeddings import TextCache
    from vlm_vision.zero_shot import TEMPLATES, ZeroShotClassifier

    labels: list[str] = []
    if arguments.csv is None:
        if arguments.classes is None:
            raise ConfigError(
                "zero-shot needs classes: --classes FILE, --classes a,b,c, or --csv FILE with labels"
            )
        pictures, classes = list_files(arguments.pictures), _class_names(arguments.classes)
    else:
        if arguments.pictures:
            raise ConfigError("zero-shot takes its pictures from --csv, so give no others")
        pictures, labels = _labelled(Path(arguments.csv))
        classes = sorted(set(labels)) if arguments.classes is None else _class_names(arguments.classes)
        strange = sorted(set(labels) - set(classes))
        if strange:
            raise DataError(
                f"{arguments.csv}: label {strange[0]!r} is no class{nearest(strange[0], classes)}"
            )
    model = load_dual_encoder(arguments.model)
    templates = arguments.template or TEMPLATES
    if len(templates) == 1 and templates[0] in NAMED:
        templates = templates[0]
    classifier = ZeroShotClassifier(model, classes, templates, cache=TextCache.of_user())
    top_k = 1 if labels else arguments.top_k
    found = classifier.classify(pictures, top_k, batch_size=arguments.batch_size)
    if labels:
        right = sum(row[0][0] == label for row, label in zip(found, labels, strict=True))
        print(f"top-1 {right / len(labels):.4f} ({right} of {len(labels)}, {len(classes)} classes)")
        return
    for path, row in zip(pictures, found, strict=True):
        print(f"{path}: " + ", ".join(f"{name} {score:.3f}" for name, score in row))


def index(arguments: argparse.Namespace) -> None:
    from vlm_vision.dual_encoder import load_dual_encoder
    from vlm_vision.preprocess import find_pictures
    from vlm_vision.search import VisualIndex

    if arguments.faiss:
        require("search", "faiss")
    pictures = find_pictures(Path(arguments.folder))
    built = VisualIndex.build(
        load_dual_encoder(arguments.model),
        pictures,
        batch_size=arguments.batch_size,
        max_bad_share=arguments.max_bad_share,
    )
    built.save(arguments.output)
    if arguments.faiss:
        built.export_faiss(arguments.faiss)
    for reason in built.bad:
        print(f"left out: {reason}")
    print(f"{arguments.output}: {len(built)} pictures, {len(built.bad)} left out")


def search(arguments: argparse.Namespace) -> None:
    from vlm_vision.dual_encoder import load_dual_encoder
    from vlm_vision.search import VisualIndex

    if (arguments.query is None) == (arguments.image is None):
        raise ConfigError("search takes one query: a text, or --image FILE")
    found = VisualIndex.load(arguments.index, load_dual_encoder(arguments.model))
    query = arguments.query if arguments.image is None else Path(arguments.image)
    for hit in found.search(query, arguments.top_k):
        print(f"{hit.score:.4f}  {hit.path}")


def score(arguments: argparse.Namespace) -> None:
    from vlm_vision.text_embeddings import TextCache
    from vlm_vision.train.validation import check_validation, evaluate

    config, output = _held_out(arguments), arguments.output
    if not config.is_asked:
        raise ConfigError(
            "score needs data: --zero-shot, --retrieval, --probe, or --config with `validation`"
        )
    check_validation(config)
    model = _load_onto_device(arguments.model)
    found = evaluate(model, config, cache=TextCache.of_user())
    for name, value in found.scores.items():
        print(f"{name:40} {value:.4f}")
    if output is None:
        return
    content: dict[str, Any] = {"model": arguments.model, "scores": found.scores}
    content["validation"] = config.model_dump(mode="json", exclude_none=True)
    if found.zero_shot is not None:
        confusion = found.zero_shot.found.confusion.tolist()
        content["zero_shot"] = {"classes": found.zero_shot.data.classes, "confusion": confusion}
    _write_json(output, content)


def merge(arguments: argparse.Namespace) -> None:
    from vlm_vision.train.merge import best_alpha, check_mergeable, mixed, plot_sweep, sweep
    from vlm_vision.train.validation import check_validation, validate_dual_encoder

    config, alphas, by, output = _held_out(arguments), arguments.alpha, arguments.by, arguments.output
    if output is not None and Path(output).exists():
        raise ConfigError(f"{output} is there already: give another folder")
    if len(alphas) > 1 and not config.is_asked:
        raise ConfigError("several alphas are scored: give --zero-shot, --retrieval, --probe or --config")
    if len(alphas) > 1 and (output is None) != (by is None):
        raise ConfigError("to write the best of several alphas: -o FOLDER --by SCORE")
    if len(alphas) == 1 and output is None and not config.is_asked:
        raise ConfigError("merge writes a model: -o FOLDER")
    if not config.is_asked and (arguments.json or arguments.plot):
        raise ConfigError(
            "--json and --plot are of scores: give --zero-shot, --retrieval, --probe or --config"
        )
    if arguments.plot is not None:
        require("train", "matplotlib")
    check_validation(config)
    base, tuned = _load_onto_device(arguments.base), _load_onto_device(arguments.tuned)
    check_mergeable(base, tuned)
    best = alphas[0]
    if config.is_asked:

        def scores_of(model: DualEncoder) -> dict[str, float]:
            scores = validate_dual_encoder(model, config)
            if by is not None:
                best_alpha({0.0: scores}, by)  # a name that is wrong shows after the first
            return scores

        found = sweep(base, tuned, alphas, scores_of)
        print(f"{'alpha':40} " + " ".join(f"{alpha:>7g}" for alpha in found))
        for name in next(iter(found.values())):
            print(f"{name:40} " + " ".join(f"{scores[name]:7.4f}" for scores in found.values()))
        if arguments.json is not None:
            rows = [{"alpha": alpha, **scores} for alpha, scores in found.items()]
            _write_json(arguments.json, {"base": arguments.base, "tuned": arguments.tuned, "sweep": rows})
        if arguments.plot is not None:
            plot_sweep(found, arguments.plot)
        best = best_alpha(found, by) if by is not None else best
    if output is not None:
        tuned.load_state_dict(mixed(base.state_dict(), tuned.state_dict(), best))
        tuned.save_pretrained(output)
        print(f"{output}: alpha {best:g}" + (f", the best by {by}" if len(alphas) > 1 else ""))


def drift(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from vlm_vision.picture_list import list_pictures, open_pictures
    from vlm_vision.tower import load_tower
    from vlm_vision.train.drift import drift as compare
    from vlm_vision.train.drift import open_projector

    pictures = list_pictures(arguments.pictures)
    step = max(1, len(pictures) // arguments.count)  # evenly over all
    chosen = pictures[::step][: arguments.count]
    before, after = load_tower(arguments.before), load_tower(arguments.after)
    projector = None if arguments.projector is None else open_projector(arguments.projector, before)
    found = compare(
        before,
        after,
        (_or_raise(picture) for picture in open_pictures(chosen)),
        projector=projector,
        batch_size=arguments.batch_size,
        total=len(chosen),
    )
    print(f"{found.pictures} pictures; a VLM reads layer {', '.join(map(str, found.read))}")
    print(f"{'layer':>9} {'cosine':>8} {'lowest':>8} {'cka':>8} {'change':>8}")
    for row in found.layers:
        print(f"{row.layer:>9} {row.cosine:8.4f} {row.cosine_min:8.4f} {row.cka:8.4f} {row.relative:8.4f}")
    if found.projected is not None:
        made = found.projected
        print(f"{'projected':>9} {made.cosine:8.4f} {made.cosine_min:8.4f} {'':8} {made.relative:8.4f}")
    if arguments.output is not None:
        _write_json(arguments.output, {"before": arguments.before, "after": arguments.after, **asdict(found)})


def plan(arguments: argparse.Namespace) -> None:
    from vlm_vision.config import load_config, read_yaml
    from vlm_vision.train.align_config import AlignConfig
    from vlm_vision.train.contrastive_config import ContrastiveConfig
    from vlm_vision.train.plan import plan_align, plan_contrastive

    path, overrides = Path(arguments.config), arguments.overrides
    options = {"world": arguments.processes, "records": arguments.records}
    if "stages" in read_yaml(path):
        print(plan_align(load_config(AlignConfig, path, overrides), **options, tokens=arguments.tokens))
    elif arguments.tokens is not None:
        raise ConfigError(f"--tokens is for stages of alignment, which {path} has not")
    else:
        print(plan_contrastive(load_config(ContrastiveConfig, path, overrides), **options))


def _held_out(arguments: argparse.Namespace) -> ValidationConfig:
    """What to score on, of the options that `score` and `merge` share."""
    from vlm_vision.config import load_config
    from vlm_vision.train.contrastive_config import ContrastiveConfig
    from vlm_vision.train.validation_config import ValidationConfig

    given = {"zero_shot": arguments.zero_shot, "retrieval": arguments.retrieval, "probe": arguments.probe}
    named = [name for name, value in given.items() if value is not None]
    if arguments.config is not None:
        if named:
            option = "--" + named[0].replace("_", "-")
            raise ConfigError(f"{option} and --config both say what to score on: give one of them")
        return load_config(ContrastiveConfig, arguments.config).validation
    columns = {name: getattr(arguments, name) for name in ("image_column", "caption_column")}
    labelled = {**columns, "templates": arguments.templates, "classes": arguments.classes}
    tree: dict[str, Any] = {"batch_size": arguments.batch_size}
    if arguments.zero_shot is not None:
        tree["zero_shot"] = {"path": arguments.zero_shot, **labelled}
    if arguments.retrieval is not None:
        tree["retrieval"] = {"path": arguments.retrieval, **columns}
    if arguments.probe is not None:
        train, test = ({"path": path, **labelled} for path in arguments.probe)
        tree["linear_probe"] = {"train": train, "test": test, "features": arguments.probe_features}
    return load_config(ValidationConfig, tree)


def _load_onto_device(source: str) -> DualEncoder:
    import torch

    from vlm_vision.dual_encoder import load_dual_encoder

    return load_dual_encoder(source).to("cuda" if torch.cuda.is_available() else "cpu")


def _write_json(path: str, content: dict[str, Any]) -> None:
    import json

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _or_raise(picture: Image.Image | DataError) -> Image.Image:
    if isinstance(picture, DataError):
        raise picture
    return picture


def _run_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or Path("runs") / Path(arguments.config).stem)


def _print_scores(parts: dict[str, dict[str, float]], output: Path, made: str = "model") -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for part, scores in parts.items():
        if part:
            print(part)
        for name, value in scores.items():
            print(f"  {name:28} {value:.4g}")
    print(f"{made}: {output / made}")


def _class_names(given: str) -> list[str]:
    """Names of a file, one per line, or between commas; or the name of a list, each of its names once."""
    from vlm_vision.prompts import CLASSES, read_classes

    if given in CLASSES:
        return list(dict.fromkeys(read_classes(given)))
    is_file = Path(given).is_file()
    names = Path(given).read_text(encoding="utf-8").splitlines() if is_file else given.split(",")
    return [name.strip() for name in names if name.strip()]


def _labelled(path: Path) -> tuple[list[Path], list[str]]:
    """Pictures and labels of a CSV with the columns image and label; paths are relative to its folder.

    Raises:
        DataError: no such file or column, no row, or an empty label.
    """
    if not path.is_file():
        raise DataError(f"{str(path)!r} does not exist")
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        for column in ("image", "label"):
            if column not in columns:
                listed = ", ".join(columns)
                raise DataError(f"{path}: no column {column!r}{nearest(column, columns)} (columns: {listed})")
        table = [(row["image"] or "", (row["label"] or "").strip()) for row in rows]
    for number, (image, label) in enumerate(table, start=1):
        if not image or not label:
            raise DataError(f"{path}, row {number}: {'label' if image else 'image'} is empty")
    if not table:
        raise DataError(f"{path}: holds no row")
    return [path.parent / image for image, _ in table], [label for _, label in table]
