"""The command line. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vlm_vision.errors import ConfigError, VlmVisionError, nearest

SCREEN = 40  # lines of an error that fit on one
INTERRUPTED = 130  # the shell's status of a command ended by Ctrl-C


class _Parser(argparse.ArgumentParser):
    """argparse, with errors told like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see: {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 after an error of the user's, told without traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    # DeepSpeed's launcher passes the rank by this option too, beside LOCAL_RANK.
    ours = [
        argument
        for argument in arguments
        if argument != "--debug" and not argument.startswith("--local_rank=")
    ]
    try:
        parsed = _parse(ours)
        run = getattr(import_module("vlm_vision.commands"), parsed.command.replace("-", "_"))
        run(parsed)
    except (VlmVisionError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # what reads our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if debug:
            raise
        print(_one_screen(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _one_screen(error: Exception) -> str:
    lines = f"error: {error}".splitlines()
    if len(lines) <= SCREEN:
        return "\n".join(lines)
    return "\n".join([*lines[:SCREEN], f"... and {len(lines) - SCREEN} more lines (all of them: --debug)"])


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    first = next((argument for argument in arguments if not argument.startswith("-")), None)
    if first is not None and first not in commands:
        raise ConfigError(
            f"unknown command {first!r}{nearest(first, commands)} (known: {', '.join(commands)})"
        )
    parsed, rest = parser.parse_known_args(arguments)
    known = [option for action in commands[parsed.command]._actions for option in action.option_strings]
    for argument in rest:  # argparse leaves what comes after an option, though the command takes several
        if argument.startswith("-") or not hasattr(parsed, "rest"):
            hint, usage = nearest(argument.split("=")[0], known), f"{parser.prog} {parsed.command} --help"
            raise ConfigError(f"{parsed.command} takes no {argument!r}{hint} (see: {usage})")
        getattr(parsed, parsed.rest).append(argument)
    return parsed


def _parsers() -> tuple[_Parser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(
        prog="vlm-vision",
        description="The vision tower for LLaVA-style vision-language models.",
        epilog="Examples: vlm-vision COMMAND --help. An error's traceback: --debug.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog="examples:\n"
            + "\n".join(f"  vlm-vision {name} {example}".rstrip() for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = command(
        "demo",
        "the whole way on drawn scenes: CLIP, tower, projector, LLM, answers, report",
        "",
        "-o runs/other --seed 1",
    )
    demo.add_argument("-o", "--output", default="runs/demo", help="folder of the run (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the scenes and of every training (default: 0)")
    demo.add_argument("--data", help="a folder of scenes made by another generator")

    towers = command(
        "towers",
        "list towers, show one without its weights, verify them against their libraries, write a plug-in",
        "--source open_clip --match '*L-14*'",
        "--match '*dinov3*' | tail -n +2 | cut -d' ' -f1   # names alone",
        "show open_clip:ViT-L-14-336-quickgelu",
        "verify open_clip:ViT-B-32 timm:convnext_tiny",
        "verify --source open_clip --match 'ViT-B-*' --table docs/towers.md",
        "new my_backbone",
    )
    towers.add_argument(
        "words",
        nargs="*",
        metavar="show TOWER | verify [TOWER ...] | new FOLDER",
        help="a source:model; show takes a folder or YAML file too; new writes a package of its name",
    )
    towers.add_argument("--source", help="only this source")
    towers.add_argument("--match", default="*", metavar="GLOB", help="only models whose name matches")
    towers.add_argument("--table", metavar="FILE.md", help="a page to which verify adds what it finds")

    projectors = command(
        "projectors",
        "list projectors: where they come from, tokens of a picture, parameters",
        "",
        "--in 1152 --out 3584 --grid 27x27",
    )
    projectors.add_argument(
        "--in", dest="in_features", type=_positive, default=1024, help="channels of a patch (default: 1024)"
    )
    projectors.add_argument(
        "--out",
        dest="out_features",
        type=_positive,
        default=4096,
        help="width of the language model (default: 4096)",
    )
    projectors.add_argument(
        "--grid", type=_grid, default="24x24", metavar="ROWSxCOLUMNS", help="patches (default: %(default)s)"
    )
    projectors.add_argument(
        "--markdown", action="store_true", help="the table of docs/projectors.md, with shapes and references"
    )

    features = command(
        "features",
        "features of pictures: one safetensors file, or a folder of shards for a data set",
        "open_clip:ViT-L-14-336-quickgelu@openai photo.jpg -o features.safetensors",
        "runs/demo/tower pictures/ -o features.safetensors --layer=-2,-3 --dtype bfloat16",
        "open_clip:ViT-L-14-336-quickgelu@openai coco/ -o runs/features --dtype float16 --format parquet",
        "my-tower 'laion/{00000..00099}.tar' -o runs/features   # run it again, and it continues",
    )
    features.epilog = f"""{features.epilog}

many GPUs, with a folder that all machines see:
  torchrun --nproc-per-node 8 -m vlm_vision.cli features my-tower coco/ -o runs/features

reading a folder back, by a picture's path in its folder or its name in the tar:
  from vlm_vision.feature_shards import FeatureShards
  FeatureShards("runs/features")["train2017/000000000009.jpg"]"""
    features.add_argument("source", metavar="tower", help="source:model@weights, a folder, or a YAML file")
    features.add_argument(
        "pictures", nargs="*", help="picture files, folders of them, and tars as webdataset packs them"
    )
    features.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="FILE.safetensors, or a folder that gets shards"
    )
    features.add_argument(
        "--layer", type=_layers, help="-2 is the one before the last; several: --layer=-2,-3"
    )
    features.add_argument(
        "--select",
        choices=["patch", "cls_patch", "cls", "pooled"],
        help="which tokens, or the whole model's embedding of the picture, not normalised (default: patch)",
    )
    features.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and features"
    )
    features.add_argument("--batch-size", type=_positive, default=32, help="pictures at once (default: 32)")
    features.add_argument(
        "--workers",
        type=_positive,
        help="processes that decode, for each GPU (default: its share of the cores)",
    )
    shards = features.add_argument_group("for a folder")
    shards.add_argument(
        "--format", choices=["safetensors", "parquet"], help="of the shards (default: safetensors)"
    )
    shards.add_argument(
        "--shard-size", type=_positive, help="pictures of a shard (default: as many as stay under 1 GiB)"
    )
    shards.add_argument(
        "--max-bad-share",
        type=_share,
        metavar="SHARE",
        help="unreadable pictures to leave out and list in bad_pictures.jsonl (default: 0.05)",
    )
    features.set_defaults(rest="pictures")

    export = command(
        "export",
        "write a tower or a model as a folder that LLaVA, transformers or open_clip load as their own",
        "open_clip:ViT-L-14-336-quickgelu@openai --to clip -o clip",
        "runs/stage2/model --to clip -o clip",
        "runs/adapted/model --to open_clip -o adapted",
        "runs/adapted/model --to transformers -o adapted",
        "runs/align/model --to transformers -o llava-hf   # a LlavaForConditionalGeneration with processor",
        "runs/align/model --to llava -o llava   # for LLaVA's own code",
        "runs/lora/model --to transformers --lora apart -o llava-hf   # adapters in llava-hf/adapter",
        "open_clip:ViT-L-14-336-quickgelu@openai --adapter lora --to clip -o clip",
    )
    export.add_argument(
        "source",
        help="a tower: source:model@weights, a folder, or a YAML file; a vision-language model's folder",
    )
    export.add_argument(
        "--to",
        choices=["clip", "open_clip", "transformers", "llava"],
        required=True,
        help="a CLIPVisionModel; of a dual encoder open_clip's model, or a CLIPModel or SiglipModel; of a "
        "vision-language model a LlavaForConditionalGeneration (in tiles, LlavaNext), or LLaVA's own files",
    )
    export.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write")
    export.add_argument(
        "--lora",
        choices=["merged", "apart"],
        default="merged",
        help="of a vision-language model whose run kept adapters: within its weights, or beside those that "
        "they learnt on",
    )
    export.add_argument(
        "--adapter", metavar="FOLDER", help="merge it first: of PEFT, or a checkpoint of a contrastive run"
    )

    data = command(
        "data",
        "check pictures with captions before training, or pack them into tars",
        "check pairs.csv",
        "check train.parquet --caption-column class_name -o runs/check   # and a page of plots and samples",
        "check configs/flickr8k_contrastive.yaml   # its data node",
        "check 's3://bucket/shards/{0..9}.tar' --workers 8",
        "check llava.json --image-folder images --tokenizer vicuna --chat-template v1 --tokens-per-image 576",
        "pack pairs.csv -o shards",
        "pack hub:owner/name@train -o shards --shard-size 1000",
    )
    data.add_argument("action", choices=["check", "pack"], help="read all of it once, or write tars")
    data.add_argument(
        "source",
        help="a table, folder, tars or hub:owner/name@split (docs/data.md), or a YAML file with a data node",
    )
    data.add_argument("-o", "--output", metavar="FOLDER", help="of the report, or of the tars")
    data.add_argument(
        "--workers", type=_count, metavar="N", help="processes that decode (default: one for each core)"
    )
    columns = data.add_argument_group("of a source that is no YAML file")
    columns.add_argument("--image-column", metavar="NAME", help="paths or encoded bytes (default: image)")
    columns.add_argument("--caption-column", metavar="NAME", help="default: caption")
    columns.add_argument("--negative-column", metavar="NAME", help="captions that do not fit their picture")
    columns.add_argument("--image-folder", metavar="FOLDER", help="default: that of the table")
    columns.add_argument(
        "--max-bad-share", type=_share, metavar="SHARE", help="samples that may be bad (default: 0.01)"
    )
    talks = data.add_argument_group("of conversations (a file of these, or a YAML file with stages)")
    talks.add_argument("--tokenizer", metavar="LLM", help="count tokens by that of a language model")
    talks.add_argument("--chat-template", metavar="NAME", help="plain, v1, llama_2, chatml or a .jinja file")
    talks.add_argument("--tokens-per-image", type=_positive, metavar="N", help="that a picture takes")
    talks.add_argument("--max-length", type=_positive, metavar="N", help="tokens of a record (default: 2048)")
    data.add_argument(
        "--shard-size", type=_positive, metavar="N", help="of pack: samples of a tar (default: 10,000)"
    )

    contrastive = command(
        "contrastive",
        "train or adapt a dual encoder on pictures with captions",
        "configs/cifar10_contrastive.yaml -o runs/cifar10",
        "my.yaml data.path=pairs.csv recipe=lora --resume",
        "my.yaml --for-vlm   # change the patch features that a VLM reads, and say how far they went",
    )
    contrastive.add_argument(
        "--for-vlm",
        action="store_true",
        help="adapt for a VLM: only recipes that change its patch features, which learn from texts directly",
    )
    align = command(
        "align",
        "align tower, projector and language model in stages",
        "configs/llava15_7b_stage1.yaml -o runs/stage1",
        "my.yaml model.tower=runs/demo/tower stages.0.lr=1e-3",
    )
    compare = command(
        "compare-projectors",
        "train several projectors alike, on the same kept features, and plot what each buys and costs",
        "configs/demo_projectors.yaml",
        "my.yaml -o runs/projectors seeds=[0,1,2]",
    )
    compare.add_argument("--ranks", type=_positive, help="processes of a training (default: one per GPU)")
    qformer = command(
        "qformer",
        "teach a Q-Former what to read of a frozen tower, before it is aligned with an LLM",
        "configs/blip2_qformer.yaml -o runs/qformer data.path=pairs.csv",
        "my.yaml tower=runs/adapted/model bert=null tokenizer=my-llm --resume",
    )
    for training in (contrastive, align, qformer, compare):
        _add_config(training)
        training.add_argument(
            "-o", "--output", metavar="FOLDER", help="folder of the run (default: runs/CONFIG)"
        )
        training.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")

    chat = command(
        "chat",
        "ask a vision-language model about pictures",
        "runs/demo/model --image photo.jpg",
        "runs/demo/model --image photo.jpg --question 'How many shapes are there?'",
        "runs/demo/model --web",
    )
    chat.add_argument("model", help="folder or hub id of a vision-language model")
    chat.add_argument("--image", help="the picture to talk about")
    chat.add_argument("--question", help="answer this and end; without it, a conversation")
    chat.add_argument("--max-new-tokens", type=_positive, default=128, help="longest answer (default: 128)")
    chat.add_argument("--web", action="store_true", help="open a page in the browser")

    evaluate = command(
        "eval",
        "ask a vision-language model a file of questions: scores with intervals, answers, a page",
        "runs/demo/model --questions vqa.json --images pictures/ -o runs/eval",
        "runs/demo/model --questions coco_pope_random.json --images val2014/ --kind yes_no",
        "runs/demo/model --questions scienceqa.jsonl --images pictures/ --kind choice",
    )
    evaluate.add_argument("model", help="folder of a vision-language model")
    evaluate.add_argument("--questions", required=True, metavar="FILE", help="JSON list or JSON lines")
    evaluate.add_argument("--images", metavar="FOLDER", help="what the names of pictures are relative to")
    evaluate.add_argument(
        "--kind",
        choices=["vqa", "yes_no", "captions", "choice"],
        help="VQAv2's accuracy, POPE's figures, loss, multiple choice (default: as the fields say)",
    )
    evaluate.add_argument(
        "--prompt", metavar="TEXT", help="under every question (default: for choices LLaVA's, else none)"
    )
    evaluate.add_argument("--batch-size", type=_positive, default=16, help="questions at once (default: 16)")
    evaluate.add_argument("--max-new-tokens", type=_positive, default=32, help="of an answer (default: 32)")
    evaluate.add_argument(
        "-o", "--output", metavar="FOLDER", help="write scores.json, answers.jsonl and report.html there"
    )

    zero_shot = command(
        "zero-shot",
        "classify pictures by the names of classes",
        "runs/demo/clip --classes 'red circle,blue square' photo.jpg",
        "open_clip:ViT-B-32-quickgelu@openai --classes classes.txt pictures/",
        "runs/demo/clip --csv labelled.csv --template 'a photo of a {}.' --template 'a {}'",
    )
    zero_shot.add_argument("model", help="a dual encoder: a folder, or open_clip:model@weights")
    zero_shot.add_argument("pictures", nargs="*", help="picture files and folders of them")
    zero_shot.add_argument(
        "--classes", metavar="FILE|a,b,c", help="a name per line, names with commas between, or imagenet"
    )
    zero_shot.add_argument("--csv", metavar="FILE", help="columns image and label: prints the top-1 accuracy")
    zero_shot.add_argument(
        "--template",
        action="append",
        help="text around a name, or openai_80, openai_7 (default: 'a photo of a {}.')",
    )
    zero_shot.add_argument("-k", "--top-k", type=_positive, default=3, help="classes to print (default: 3)")
    zero_shot.add_argument("--batch-size", type=_positive, default=64, help="pictures at once (default: 64)")
    zero_shot.set_defaults(rest="pictures")

    index = command(
        "index", "embed a folder of pictures for search", "runs/demo/clip pictures/ -o runs/index"
    )
    index.add_argument("model", help="a dual encoder: a folder, or open_clip:model@weights")
    index.add_argument("folder", help="pictures, subfolders included")
    index.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder of the index")
    index.add_argument("--batch-size", type=_positive, default=64, help="pictures at once (default: 64)")
    index.add_argument(
        "--max-bad-share", type=_share, default=0.05, help="unreadable pictures to leave out (default: 0.05)"
    )
    index.add_argument("--faiss", metavar="FILE", help="also write a faiss index")

    search = command(
        "search",
        "find pictures by text or by picture",
        "runs/index runs/demo/clip 'a red circle'",
        "runs/index runs/demo/clip --image photo.jpg -k 5",
    )
    search.add_argument("index", help="folder that `index` wrote")
    search.add_argument("model", help="the dual encoder that made the index")
    search.add_argument("query", nargs="?", help="text to look for")
    search.add_argument("--image", help="look for pictures like this one instead")
    search.add_argument("-k", "--top-k", type=_positive, default=10, help="pictures to print (default: 10)")

    score = command(
        "score",
        "score a dual encoder: zero-shot classes, retrieval, linear probe",
        "runs/adapted/model --zero-shot labelled.csv --caption-column label --templates openai_80",
        "open_clip:ViT-B-32-quickgelu@openai --retrieval pairs.csv -o scores.json",
        "runs/adapted/model --probe cars/train cars/test   # class folders, or CLIP_benchmark's layout",
        "runs/adapted/model --config runs/adapted/config.yaml   # what the run was scored on",
    )
    score.add_argument("model", help="a dual encoder: a folder, or open_clip:model@weights")
    _add_held_out(score)
    score.add_argument("-o", "--output", metavar="FILE.json", help="also write the scores there")

    merge = command(
        "merge",
        "mix the weights of a model and one tuned from it (WiSE-FT), or find the best mix",
        "open_clip:ViT-B-32-quickgelu@openai runs/adapted/model --alpha 0.5 -o merged",
        "base tuned --alpha 0,0.25,0.5,0.75,1 --config run.yaml --json sweep.json --plot sweep.png",
        "base tuned --alpha 0,0.5,1 --zero-shot labelled.csv --by zero_shot_top1 -o merged",
    )
    merge.add_argument("base", help="the model that was tuned: a folder, or open_clip:model@weights")
    merge.add_argument("tuned", help="the model that it became")
    merge.add_argument(
        "--alpha",
        type=_alphas,
        required=True,
        metavar="A[,A...]",
        help="0 is the base, 1 the tuned model; several are scored, each on the data given below",
    )
    merge.add_argument("-o", "--output", metavar="FOLDER", help="folder of the merged model")
    merge.add_argument("--by", metavar="SCORE", help="of several alphas, write the one where this is highest")
    merge.add_argument("--json", metavar="FILE", help="scores by alpha")
    merge.add_argument("--plot", metavar="FILE.png", help="scores over alpha")
    _add_held_out(merge)

    drift = command(
        "drift",
        "how far training moved the patch features of a tower, layer by layer",
        "open_clip:ViT-B-32-quickgelu@openai runs/adapted/model pictures/",
        "base tuned pictures/ --projector llava/mm_projector.bin   # what an existing VLM loses",
    )
    drift.add_argument("before", help="a tower or dual encoder: a folder, or source:model@weights")
    drift.add_argument("after", help="the one that it became")
    drift.add_argument("pictures", nargs="*", help="picture files, folders of them, and tars")
    drift.add_argument("--projector", help="of a VLM that reads `before`: its folder, or mm_projector.bin")
    drift.add_argument("--count", type=_positive, default=256, help="pictures to take (default: 256)")
    drift.add_argument("--batch-size", type=_positive, default=8, help="pictures at once (default: 8)")
    drift.add_argument("-o", "--output", metavar="FILE.json", help="also write the figures there")
    drift.set_defaults(rest="pictures")

    plan = command(
        "plan",
        "tokens, parameters that learn, steps and memory of a config, before any weight is read",
        "configs/llava15_7b_stage2.yaml --processes 8 --records 665298",
        "configs/cifar10_contrastive.yaml recipe=lora",
    )
    _add_config(plan)
    plan.add_argument("--processes", type=_positive, default=1, help="that share the work (default: 1)")
    plan.add_argument("--records", type=_positive, help="size of the data, where it is not there to count")
    plan.add_argument(
        "--tokens", type=_positive, help="of a conversation in the mean, for hours (default: max_length)"
    )
    return parser, dict(commands.choices)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values to change, by their path")
    parser.set_defaults(rest="overrides")


def _add_held_out(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group(
        "held-out data", "files and folders as `contrastive` reads them, or CLIP_benchmark's layout"
    )
    data.add_argument("--config", metavar="YAML", help="take the `validation` of a contrastive config")
    data.add_argument("--zero-shot", metavar="DATA", help="pictures with class names")
    data.add_argument("--retrieval", metavar="DATA", help="pictures with captions")
    data.add_argument(
        "--probe",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="pictures with class names to fit on, and to score",
    )
    data.add_argument(
        "--probe-features",
        choices=["pooled", "patches", "both"],
        default="pooled",
        help="embeddings, or the mean of the patches that a VLM reads (default: pooled)",
    )
    data.add_argument(
        "--templates",
        metavar="NAME|FILE",
        help="around class names: openai_80, openai_7, or a file (default: the data's, or the bare name)",
    )
    data.add_argument("--classes", metavar="NAME|FILE", help="imagenet, or a file (default: the data's)")
    data.add_argument("--image-column", default="image", help="of tables (default: image)")
    data.add_argument("--caption-column", default="caption", help="captions or classes (default: caption)")
    data.add_argument("--batch-size", type=_positive, default=128, help="pictures at once (default: 128)")


def _alphas(text: str) -> list[float]:
    return [_share(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be rows x columns, as 24x24, not {text!r}")
    return int(found[1]), int(found[2])


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return share


def _layers(text: str) -> int | list[int]:
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be a number, or numbers with commas between, not {text!r}")
    numbers = [int(number) for number in text.split(",")]
    return numbers[0] if len(numbers) == 1 else numbers


if __name__ == "__main__":
    sys.exit(main())
