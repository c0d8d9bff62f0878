"""What transformers' auto classes need beside a model: its config, and a processor of its text and pictures.

`import vlm_vision.train.vlm` registers both, and the model: transformers looks for no plug-ins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BatchFeature, PreTrainedConfig
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from vlm_vision.adapters.config import BuildArguments
from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError
from vlm_vision.tower import resolve_folder
from vlm_vision.train.chat_parts import taking_parts
from vlm_vision.train.conversations import IMAGE_TOKEN
from vlm_vision.train.vlm_folder import MODEL_TYPE

TOKENIZER_FOLDER = "tokenizer"


class VisionLanguageConfig(PreTrainedConfig):  # type: ignore[misc]
    """Of a model in a folder, its parts; of one in memory, also what transformers asks a model for.

    Attributes:
        parts: which of tower, projector and llm the folder holds.
        text_config: the language model's own config.
        image_token_id: what `<image>` is in `input_ids` that our processor makes.
    """

    model_type = MODEL_TYPE

    parts: list[str] | None = None
    text_config: Any = None
    image_token_id: int | None = None


class VlmProcessor(ProcessorMixin):  # type: ignore[misc]
    """Text and pictures as a model's inputs, by transformers' calls.

    `processor.apply_chat_template(messages, ...)` takes contents of parts and of text; `<image>` in a text
    stands for a picture, and is written as often as that takes tokens.

    Attributes:
        tokens_per_image: tokens that one picture takes.
        image_token, image_token_id: what `<image>` is.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 0,
        chat_template: str | None = None,
    ) -> None:
        self.tokens_per_image = tokens_per_image
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
        tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        return cls(
            VlmVisionImageProcessor.from_pretrained(folder / "tower"),
            tokenizer,
            described.projector.tokens_out(described.grid),
            taking_parts(tokenizer.chat_template),
        )

    def __call__(
        self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` [B,T], and `pixel_values` [P,3,H,W] of all pictures in order.

        Rows of generation are padded on the left, unless `padding_side` says otherwise.

        Raises:
            DataError: no text, or `<image>` marks and pictures do not match.
        """
        if text is None:
            raise DataError("a processor of a vision-language model needs `text`")
        rows = [text] if isinstance(text, str) else list(text)
        pictures = [] if images is None else make_flat_list_of_images(images)
        marks = sum(row.count(IMAGE_TOKEN) for row in rows)
        if marks != len(pictures):
            raise DataError(f"{marks} {IMAGE_TOKEN} in the text, but {len(pictures)} picture(s)")
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise DataError(f"{name}: these models see pictures")
        return_tensors = kwargs.pop("return_tensors", None)
        expanded = [row.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image) for row in rows]
        options = {"padding_side": "left", "add_special_tokens": False, **kwargs}
        inputs = dict(self.tokenizer(expanded, return_tensors=return_tensors, **options))
        if pictures:
            inputs |= dict(self.image_processor(pictures, return_tensors=return_tensors))
        return BatchFeature(inputs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


AutoConfig.register(MODEL_TYPE, VisionLanguageConfig)
AutoProcessor.register(VisionLanguageConfig, VlmProcessor)
