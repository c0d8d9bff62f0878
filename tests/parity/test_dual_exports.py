"""Whole dual encoders in the other libraries: embeddings, temperature and token ids are the same there.

Tolerances are absolute on embeddings before normalising, of size 1 to 4, in fp32 on CPU.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from duals import HERE, SIGLIP_SIZE, TEXTS, dual, pixels, saved, stirred, worst
from PIL import Image
from tiny import captioned_pictures, clip_tokenizer_files, tiny_dual_encoder
from torch import Tensor
from transformers import AutoTokenizer, CLIPProcessor, CLIPTokenizer, CLIPVisionModel

from vlm_vision import DualEncoder, architectures, load_dual_encoder
from vlm_vision.cli import main
from vlm_vision.errors import ConfigError
from vlm_vision.export import export_open_clip, export_transformers
from vlm_vision.text import OpenClipTokenizer
from vlm_vision.tokenizer_files import write_tokenizer

TOLERANCE = 1e-5  # 2.5e-6


@pytest.fixture
def small_siglips(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's smallest size and a vocabulary, as if open_clip and timm had them."""
    monkeypatch.setitem(architectures._SIGLIP_SIZES, "base", SIGLIP_SIZE)
    monkeypatch.setitem(architectures._SIGLIP_TOKENIZERS, 520, "nobody/siglip")


@torch.no_grad()
def ours(model: DualEncoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    pooled = model.tower.pooled(pixels())
    image = pooled if model.image_projection is None else model.image_projection(pooled)
    return image, model.text(tokens)


def features(output: Any) -> Tensor:
    """Of `get_..._features`: transformers 5 wraps them."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


@torch.no_grad()
def assert_transformers_agrees(model: DualEncoder, folder: Path, name: str) -> None:
    library, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.tokenizer.context_length
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert tokens.shape == (len(TEXTS), length)
    image = library.eval().get_image_features(pixel_values=pixels())
    text = library.get_text_features(input_ids=tokens)
    found = (features(image), features(text))
    assert worst(found, ours(model, model.tokenizer(TEXTS))) <= TOLERANCE
    assert float(library.logit_scale) == float(model.logit_scale)
    if model.logit_bias is not None:
        assert float(library.logit_bias) == float(model.logit_bias)


@torch.no_grad()
def assert_open_clip_agrees(model: DualEncoder, folder: Path) -> None:
    name = f"local-dir:{folder}"
    library, _, transform = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    assert tokens.shape == (len(TEXTS), model.tokenizer.context_length)
    found = (library.eval().encode_image(pixels()), library.encode_text(tokens))
    assert worst(found, ours(model, model.tokenizer(TEXTS))) <= TOLERANCE
    assert float(library.logit_scale) == float(model.logit_scale)
    bias = library.logit_bias
    assert (bias is None) == (model.logit_bias is None)
    if bias is not None and model.logit_bias is not None:
        assert float(bias) == float(model.logit_bias)
    settings = model.image_processor.config
    assert tuple(transform.transforms[-1].mean) == settings.mean


@pytest.mark.usefixtures("small_siglips")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("open_clip", "CLIPModel"),
        ("open_clip, SigLIP of timm", "SiglipModel"),
        ("CLIP", "CLIPModel"),
        ("CLIP, highest id, GELU", "CLIPModel"),
        ("SigLIP", "SiglipModel"),
    ],
)
def test_transformers_loads_the_whole_and_computes_the_same(kind: str, name: str, tmp_path: Path) -> None:
    model = dual(kind, tmp_path)
    assert export_transformers(model, tmp_path / "export") == name
    assert_transformers_agrees(model, tmp_path / "export", name)
    config = json.loads((tmp_path / "export" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [name]
    again = load_dual_encoder(f"transformers:{tmp_path / 'export'}")
    tokens = model.tokenizer(TEXTS)
    assert worst(ours(again, tokens), ours(model, tokens)) <= TOLERANCE
    assert again.state_dict().keys() >= {"logit_scale"}


@pytest.mark.usefixtures("small_siglips")
@pytest.mark.parametrize(
    "kind",
    ["open_clip", "open_clip, ResNet", "open_clip, SigLIP of timm", *[k for k in HERE if "CLIP" in k[:4]]],
)
def test_open_clip_loads_the_whole_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    model = dual(kind, tmp_path)
    export_open_clip(model, tmp_path / "export")
    assert_open_clip_agrees(model, tmp_path / "export")


@pytest.mark.usefixtures("small_siglips")
def test_a_siglip_of_transformers_in_open_clip(tmp_path: Path) -> None:
    """Where timm has its trunk, here the one that open_clip's own SigLIP was exported with."""
    first = dual("open_clip, SigLIP of timm", tmp_path)
    export_transformers(first, tmp_path / "theirs")
    model = load_dual_encoder(f"transformers:{tmp_path / 'theirs'}")
    export_open_clip(model, tmp_path / "back")
    assert_open_clip_agrees(model, tmp_path / "back")
    tokens = first.tokenizer(TEXTS)
    assert worst(ours(model, tokens), ours(first, tokens)) <= TOLERANCE


@torch.no_grad()
def test_clips_processor_prepares_texts_and_pictures(tmp_path: Path) -> None:
    model = dual("open_clip", tmp_path)
    export_transformers(model, tmp_path / "export")
    captioned_pictures(tmp_path / "pictures", 1)
    picture = Image.open(tmp_path / "pictures" / "0.png")
    processor = CLIPProcessor.from_pretrained(tmp_path / "export")
    batch = processor(text=TEXTS, images=picture, padding=True, truncation=True, return_tensors="pt")
    library = transformers.CLIPModel.from_pretrained(tmp_path / "export").eval()
    output = library(**{**batch, "pixel_values": pixels()})
    assert worst([output.text_embeds], [model.encode_text(model.tokenizer(TEXTS))]) <= TOLERANCE
    assert worst([output.image_embeds], [model.encode_image(pixels())]) <= TOLERANCE
    difference = batch["pixel_values"] - model.image_processor([picture])
    assert float(difference.abs().max()) < 2e-2  # 1 of 255 where the two round a resize differently


@torch.no_grad()
def test_llava_reads_the_vision_tower_out_of_the_whole(tmp_path: Path) -> None:
    """As LLaVA's `clip_encoder.py` loads its `--vision_tower`."""
    model = dual("open_clip", tmp_path)
    export_transformers(model, tmp_path / "export")
    vision, report = CLIPVisionModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not report["missing_keys"]
    states = vision.eval()(pixels(), output_hidden_states=True).hidden_states
    assert worst([states[-2][:, 1:]], [model.tower(pixels())]) <= TOLERANCE


def odd_texts() -> list[str]:
    """200 texts: words, numbers, marks, scripts, emoji and their joins, white space, long ones."""
    written = [
        "",
        " ",
        "a",
        "A photo of a DOG.",
        "don't can't I'm we've they'd it's IT'S",
        "x" * 400,
        "1234567890 3.14 1e-5 50% #1",
        "semi;colon: (brackets) [square] {curly} <angle>",
        "tab\tnew\nline\r\n",
        "“curly” ‘quotes’ it’s",
        "em—dash en–dash …",
        "ﬁne ﬂour ﬀ",
        "ＦＵＬＬ　ｗｉｄｔｈ　１２３",
        "&amp; &lt;b&gt; &quot;q&quot;",
        "&amp;amp; &#39;",
        "naïve café résumé Å",
        "e\u0301 and \u00e9",
        "ΟΔΟΣ και Σίσυφος",
        "Straße ß ẞ",
        "İstanbul ı",
        "Привет, мир!",
        "שלום עולם",
        "مرحبا بالعالم",
        "नमस्ते दुनिया",
        "สวัสดีชาวโลก",
        "你好，世界",
        "こんにちは世界",
        "안녕 세상",
        "🎉",
        "👩‍👩‍👧‍👦 family",
        "🇩🇪🇫🇷",
        "👍🏽👍🏿",
        "❤️ ☀️ ✂️",
        "🧑🏾‍🚀 in 🚀",
        "😀" * 100,
        "a😀b🎈c",
        "zero\u200bwidth",
        "no\u00a0break",
        "\ufeffmark",
        "bell\x07 null\x00",
        "\x1b[31mred\x1b[0m",
        "line\u2028break",
        "snake_case camelCase",
        "http://a.b/c?d=e&f=g",
        "C++ & C#",
        "--- *** ///",
        "!!!??",
        "½ ² ³ ™ ©",
        "Ⅷ ①",
        "word " * 90,
        "the quick brown fox " * 30,
        "trailing   ",
        "   leading",
        "a\u3000b",
        "''' \"\"\" ```",
    ]
    draw = random.Random(0)
    letters = (
        string.printable
        + "éüñøßçžłĐ"
        + "αβγδΩ"
        + "абвгдЖ"
        + "你好世界猫"
        + "こんにちは"
        + "🎉😀🐱🚗❤🏽"
        + "“”’—…"
    )
    sizes = [draw.choice([3, 12, 40, 150]) for _ in range(200 - len(written))]
    return written + ["".join(draw.choice(letters) for _ in range(size)) for size in sizes]


def test_token_ids_of_odd_texts_are_open_clips(tmp_path: Path) -> None:
    for context_length in (77, 16):
        folder = tmp_path / str(context_length)
        folder.mkdir()
        write_tokenizer(OpenClipTokenizer({"context_length": context_length}), folder)
        own = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = odd_texts()
        assert len(texts) == 200
        found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        expected = own(texts)
        end = expected.argmax(dim=1, keepdim=True)
        padding = torch.arange(context_length) > end
        different = [
            text
            for text, a, b in zip(texts, found, expected.where(~padding, 49407), strict=True)
            if not torch.equal(a, b)
        ]
        assert different == []
    by_name = CLIPTokenizer.from_pretrained(tmp_path / "77")  # has transformers' own, plainer cleaning
    plain = ["a red square", "two cats, one dog", "naïve café 🎉", "Hello   WORLD it's"]
    assert [by_name(text)["input_ids"] for text in plain] == [
        [49406, *own.encode(text), 49407] for text in plain
    ]


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
def test_open_clips_cleaning_goes_before_a_tokenizer_of_transformers(clean: str, tmp_path: Path) -> None:
    clip_tokenizer_files(tmp_path / "files")
    settings = {"context_length": 32, "hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": clean}}
    tokenizer = OpenClipTokenizer(settings, str(tmp_path / "files"))
    (tmp_path / "export").mkdir()
    write_tokenizer(tokenizer, tmp_path / "export")
    texts = odd_texts()
    library = AutoTokenizer.from_pretrained(tmp_path / "export")
    found = library(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    expected = tokenizer(texts)
    different = [text for text, a, b in zip(texts, found, expected, strict=True) if not torch.equal(a, b)]
    assert different == []


@torch.no_grad()
def test_a_model_with_clips_own_tokenizer_takes_open_clips(tmp_path: Path) -> None:
    model = stirred(tiny_dual_encoder())
    export_transformers(model, tmp_path / "theirs")
    again = load_dual_encoder(f"transformers:{tmp_path / 'theirs'}")
    export_open_clip(again, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "open_clip_config.json").read_text(encoding="utf-8"))
    assert "hf_tokenizer_name" not in config["model_cfg"]["text_cfg"]
    assert not list((tmp_path / "back").glob("*token*"))
    assert_open_clip_agrees(again, tmp_path / "back")


def test_what_has_no_counterpart_is_refused_with_the_way_out(tmp_path: Path) -> None:
    in_library, in_open_clip = (f"no counterpart in {name}: " for name in ("transformers", "open_clip"))
    for kind, export, message in (
        ("open_clip, ResNet", export_transformers, f"{in_library}.*a ModifiedResNet .*--to open_clip"),
        ("open_clip, SigLIP of timm", export_open_clip, "resized to 64, and open_clip builds its trunk"),
        ("SigLIP", export_open_clip, f"{in_open_clip}no SigLIP trunk .*--to transformers"),
        ("SigLIP2 NaFlex", export_open_clip, f"{in_open_clip}model_type 'siglip2'"),
    ):
        if kind.startswith("open_clip") or kind in HERE:
            refused = dual(kind, tmp_path / kind, **({"image_size": 64} if "timm" in kind else {}))
            with pytest.raises(ConfigError, match=message):
                export(refused, tmp_path / "export")  # type: ignore[operator]
    model = tiny_dual_encoder()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))
    with pytest.raises(ConfigError, match=r"CLIPModel has none: set model.logit_bias = None"):
        export_transformers(model, tmp_path / "export")
    export_open_clip(model, tmp_path / "biased")
    biased = open_clip.create_model(f"local-dir:{tmp_path / 'biased'}")
    assert biased.logit_bias.item() == -3.0
    saved("SigLIP", tmp_path / "siglip")
    siglip = load_dual_encoder(f"transformers:{tmp_path / 'siglip'}")
    siglip.logit_bias = None
    with pytest.raises(ConfigError, match=r"without its logit_bias.*load it from its source again"):
        export_transformers(siglip, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_command_writes_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dual_encoder().save_pretrained(tmp_path / "dual")
    arguments = ["export", str(tmp_path / "dual"), "--to", "transformers", "-o", str(tmp_path / "clip")]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert told == (
        f"{tmp_path / 'clip'}: transformers.CLIPModel.from_pretrained, and AutoProcessor.from_pretrained\n"
    )
    assert_transformers_agrees(load_dual_encoder(tmp_path / "dual"), tmp_path / "clip", "CLIPModel")
