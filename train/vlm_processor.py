"""What transformers' auto classes need beside a model: its config, and a processor of its text and pictures.

`import vlm_vision.train.vlm` registers both, and the model: transformers looks for no plug-ins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from vlm_vision.adapters.config import BuildArguments
from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower import resolve_folder
from vlm_vision.train.chat_parts import taking_parts
from vlm_vision.train.conversations import IMAGE_TOKEN
from vlm_vision.train.tiles import TileFormat
from vlm_vision.train.vlm_folder import MODEL_TYPE

TOKENIZER_FOLDER = "tokenizer"


class VisionLanguageConfig(PreTrainedConfig):  # type: ignore[misc]
    """Of a model in a folder, its parts; of one in memory, also what transformers asks a model for.

    Attributes:
        parts: which of tower, projector, llm and tiles the folder holds.
        tiling: fields of `TilingConfig` where pictures are cut into tiles, else None.
        text_config: the language model's own config.
        image_token_id: what `<image>` is in `input_ids` that our processor makes.
    """

    model_type = MODEL_TYPE

    parts: list[str] | None = None
    tiling: dict[str, Any] | None = None
    text_config: Any = None
    image_token_id: int | None = None


class VlmProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text and pictures as a model's inputs, by transformers' calls.

    `processor.apply_chat_template(messages, ...)` takes contents of parts and of text; `<image>` in a text
    stands for a picture, and is written as often as that takes tokens.

    Attributes:
        tokens_per_image: tokens that one picture takes; where they are cut into tiles, those of a tile.
        tiling, grid: fields of `TilingConfig` where pictures are cut into tiles, and the rows and columns of
            a tile's tokens; else None.
        image_token, image_token_id: what `<image>` is.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 0,
        chat_template: str | None = None,
        tiling: dict[str, Any] | None = None,
        grid: Sequence[int] | None = None,
    ) -> None:
        self.tokens_per_image, self.tiling, self.grid = tokens_per_image, tiling, grid
        self._tiles: TileFormat | None = None
        if tiling is not None and grid is not None:
            config = validate(TilingConfig, tiling, "tiling")
            self._tiles = TileFormat(config, image_processor.own, (grid[0], grid[1]))
        self.image_token = IMAGE_TOKEN
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Any:
        """Of a model's folder or hub id, or of a folder that `save_pretrained` wrote.

        Raises:
            ConfigError: a model whose projector reads what is asked, which only `model.answer` gives it.
        """
        folder = resolve_folder(source)
        if not (folder / "projector" / "config.json").is_file():
            return super().from_pretrained(folder, **kwargs)
        if (folder / "projector" / TOKENIZER_FOLDER).is_dir():
            raise ConfigError(
                f"{folder}: its projector reads what is asked about a picture, which no processor tells "
                "apart from the rest of a prompt: use VisionLanguageModel.answer"
            )
        from vlm_vision.integrations.transformers import VlmVisionImageProcessor

        path = folder / "projector" / "config.json"
        described = validate(BuildArguments, json.loads(path.read_text(encoding="utf-8")), str(path))
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        return cls(
            VlmVisionImageProcessor.from_pretrained(folder / "tower"),
            tokenizer,
            described.projector.tokens_out(described.grid),
            taking_parts(tokenizer.chat_template),
            model.get("tiling"),
            list(described.projector.grid_out(described.grid)) if "tiling" in model else None,
        )

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B,T], and `pixel_values` [P,3,H,W] of all pictures in order.

        Of a model with tiles, `pixel_values` are all pictures' tiles, and `image_sizes` [P,2] their (height,
        width).

        Pictures are Pillow's, arrays and tensors of bytes, files or addresses, in whatever nesting.

        Rows of generation are padded on the left, unless `padding_side` says otherwise.

        Raises:
            DataError: no text, a picture that cannot be read, or `<image>` marks and pictures do not match.
        """
        if text is None:
            raise DataError("a processor of a vision-language model needs `text`")
        rows = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else self.image_processor.open_pictures(images)
        marks = sum(row.count(IMAGE_TOKEN) for row in rows)
        if marks != len(pictures):
            raise DataError(f"{marks} {IMAGE_TOKEN} in the text, but {len(pictures)} picture(s)")
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise DataError(f"{name}: these models see pictures")
        return_tensors = kwargs.pop("return_tensors", None)
        seen, counts = self._see(pictures, return_tensors)
        expanded = [_expanded(row, counts) for row in rows]
        options = {"padding_side": "left", "add_special_tokens": False, **kwargs}
        inputs = dict(self.tokenizer(expanded, return_tensors=return_tensors, **options))
        return BatchFeature({**inputs, **seen})

    def _see(
        self, pictures: Sequence[Any], return_tensors: str | None
    ) -> tuple[dict[str, Any], Iterator[int]]:
        """What opened pictures give a model, and how many tokens each takes."""
        if not pictures:
            return {}, iter(())
        if self._tiles is None:
            made = self.image_processor(pictures, return_tensors=return_tensors)
            return dict(made), repeat(self.tokens_per_image)
        pixels, sizes = self._tiles(pictures)
        counts = [self._tiles.num_tokens((width, height)) for height, width in sizes.tolist()]
        made = BatchFeature(
            {"pixel_values": list(pixels.numpy()), "image_sizes": sizes.tolist()}, tensor_type=return_tensors
        )
        return dict(made), iter(counts)

    @property
    def model_input_names(self) -> list[str]:
        sizes = [] if self._tiles is None else ["image_sizes"]
        return ["input_ids", "attention_mask", "pixel_values", *sizes]


def _expanded(row: str, counts: Iterator[int]) -> str:
    """A text in which each mark of a picture is written as often as that takes tokens."""
    first, *rest = row.split(IMAGE_TOKEN)
    return first + "".join(IMAGE_TOKEN * next(counts) + piece for piece in rest)


AutoConfig.register(MODEL_TYPE, VisionLanguageConfig)
AutoProcessor.register(VisionLanguageConfig, VlmProcessor)
