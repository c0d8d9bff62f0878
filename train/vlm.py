"""The vision-language model: tower, projector and any causal language model of transformers.

Importing this module registers it with `AutoModelForImageTextToText`, `AutoConfig` and `AutoProcessor`.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    TextIteratorStreamer,
)
from transformers.utils import ModelOutput

from vlm_vision.adapters.build import load_projector, save_projector
from vlm_vision.adapters.config import Grid, ProjectorConfig
from vlm_vision.adapters.projector import Projector
from vlm_vision.adapters.qformer_config import QFormerTextConfig
from vlm_vision.config import validate
from vlm_vision.errors import ConfigError, DataError, WeightsError, nearest
from vlm_vision.files import whole_folder
from vlm_vision.preprocess import Picture
from vlm_vision.tiling_config import TilingConfig
from vlm_vision.tower import VisionTower, resolve_folder
from vlm_vision.train.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_ID,
    ChatFormat,
    Instructions,
    Turn,
    stack_instructions,
)
from vlm_vision.train.label_loss import LossKernel, check_kernel, label_loss
from vlm_vision.train.packing import attention_inputs
from vlm_vision.train.tiles import TileMerger, load_newline, save_newline, set_newline, tile_format
from vlm_vision.train.vlm_folder import FOREIGN, MODEL_TYPE, is_vlm_folder
from vlm_vision.train.vlm_import import check_loaded, read_parts
from vlm_vision.train.vlm_processor import TOKENIZER_FOLDER, VisionLanguageConfig

Part = Literal["tower", "projector", "llm", "tiles"]
PARTS: tuple[Part, ...] = ("tower", "projector", "llm")
"""What every model has; `tiles` as well where the ends of rows of a picture in tiles are learnt."""
# Values of a generation config that change nothing.
GREEDY = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0}
# What auto classes of transformers hand to `from_pretrained`, whoever asks.
PASSED_ON = ("config", "trust_remote_code", "adapter_kwargs", "revision", "_from_auto", "_commit_hash")


@dataclass
class VlmOutput(ModelOutput):  # type: ignore[misc]
    """What a forward pass gives.

    Attributes:
        loss: mean cross entropy of the label tokens, fp32; None without labels.
        logits: [B,T,V]; None with labels, where they are never held as a whole.
    """

    loss: Float[Tensor, ""] | None = None
    logits: Tensor | None = None


class VisionLanguageModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Pictures and text in, text out. A picture's tokens take the places of IMAGE_TOKEN_ID in `input_ids`.

    A model of transformers: AutoModelForImageTextToText loads what `save_pretrained` wrote, AutoProcessor
    gives the inputs of `generate`. The parts are made elsewhere and keep their weights as they are.

    Attributes:
        vision_tower, projector, llm: the three parts; parameter names begin with these.
        tiles: what lays tiles of a picture together, with the learnt `tiles.image_newline`; None where a
            picture is one tile.
        tokenizer: the language model's, with the chat template that conversations are written by.
        instructions: what a projector that reads text is given; None for others. Its tokenizer is
            `text_tokenizer`, or the one that the projector's config names, or the language model's.
        loss_kernel: how the loss is computed, as of `train.label_loss`.

    Args:
        tiling: how pictures become tiles, as LLaVA's `anyres`; None takes each as one. In tiles, pictures go
            with their `image_sizes`, as `prepare_pictures` and our processor give them.

    Raises:
        ConfigError: widths that do not fit, a tokenizer without chat template, one with more tokens than a
            projector that reads text knows, a tower whose pictures, and so their tokens, are of no one size,
            or tiling that tower or projector cannot serve.
    """

    llm: Any
    loss_kernel: LossKernel = "chunks"
    config_class = VisionLanguageConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The language model chooses its kernels; refusing a name here would deny it to that.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        vision_tower: VisionTower,
        projector: Projector,
        llm: nn.Module,
        tokenizer: Any,
        text_tokenizer: Any = None,
        tiling: TilingConfig | None = None,
    ) -> None:
        super().__init__(VisionLanguageConfig(parts=list(PARTS), text_config=llm.config))
        vision_tower.image_processor.check_one_size("a vision-language model")
        self.vision_tower, self.projector, self.llm = vision_tower, projector, llm
        self.tokenizer = tokenizer
        width = embedding_width(llm)
        if (projector.in_features, projector.out_features) != (vision_tower.hidden_size, width):
            raise ConfigError(
                f"projector maps {projector.in_features} to {projector.out_features} channels, but the tower "
                f"gives {vision_tower.hidden_size} and the language model takes {width}"
            )
        self.tiles: TileMerger | None = None
        if tiling is not None:
            form = tile_format(tiling, vision_tower, projector.config, token_grid(vision_tower))
            self.tiles = TileMerger(form, width).to(next(iter(projector.parameters()), llm_weight(llm)).dtype)
            self.config.tiling = tiling.model_dump(mode="json")
        self.config.parts = list(self.parts)
        self.chat = ChatFormat(tokenizer, None if self.tiles else self.tokens_per_image)
        self.instructions = _instructions(projector, text_tokenizer, tokenizer)
        self.config.image_token_id = self.chat.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.generation_config = llm.generation_config

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.llm.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.llm.get_output_embeddings()
        return embeddings

    @property
    def tokens_per_image(self) -> int:
        """Tokens that one picture takes in the language model; the most of them where it is in tiles."""
        if self.tiles is not None:
            return self.tiles.form.most_tokens
        return self.projector.tokens_out(token_grid(self.vision_tower))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts with weights of their own, each a folder when saved."""
        has_newline = self.tiles is not None and self.tiles.image_newline is not None
        return (*PARTS, "tiles") if has_newline else PARTS

    def prepare_pictures(
        self, pictures: Sequence[Picture]
    ) -> tuple[Float[Tensor, "p 3 h w"] | None, Int[Tensor, "p 2"] | None]:
        """Pixels of pictures and, where the model takes them in tiles, their `image_sizes`.

        Returns:
            None for both where there is no picture; pixels of all tiles in order where there are tiles.

        Raises:
            DataError: a picture that cannot be read, or is too thin for every size that `tiling` offers.
        """
        if not pictures:
            return None, None
        if self.tiles is not None:
            return self.tiles.form(pictures)
        return self.vision_tower.image_processor(pictures), None

    def use_loss_kernel(self, kernel: LossKernel) -> None:
        """Choose how the loss is computed.

        Raises:
            MissingExtraError, ConfigError: it cannot be here, see `train.label_loss.check_kernel`.
        """
        check_kernel(kernel, self.llm)
        self.loss_kernel = kernel

    def part(self, name: Part) -> nn.Module:
        """A part by the name of its folder."""
        parts: dict[Part, Any] = {
            "tower": self.vision_tower,
            "projector": self.projector,
            "llm": self.llm,
            "tiles": self.tiles,
        }
        part: nn.Module = parts[name]
        return part

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
        pixels: Float[Tensor, "p 3 h w"] | None = None,
        label_count: float | None = None,
        patches: Float[Tensor, "p n d"] | None = None,
        text: Mapping[str, Tensor] | None = None,
        pixel_values: Float[Tensor, "p 3 h w"] | None = None,
        position_ids: Int[Tensor, "b t"] | None = None,
        image_sizes: Int[Tensor, "p 2"] | None = None,
    ) -> VlmOutput:
        """Next-token logits, or with labels their loss.

        Args:
            labels: IGNORE_INDEX where nothing is learnt; shifted here, as transformers does.
            pixels: the pictures of all rows in order, or all their tiles.
            label_count: what the summed loss is divided by; by default the labels here. A batch that is split
                over ranks and accumulation steps has one mean only with one count for all its pieces.
            patches: what the tower makes of the pictures, where that is kept; then it is not run.
            text: `text_ids` and `text_mask` [P,T] of the pictures, for a projector that reads text; see
                `asked`.
            pixel_values: what transformers calls `pixels`; one of the two.
            position_ids: of packed rows, whose attention mask counts conversations; see train/packing.py.
            image_sizes: (height, width) of the pictures, where they are in tiles.

        Raises:
            DataError: image tokens, pictures and sizes do not match.
        """
        pixels = pixel_values if pixels is None else pixels
        embeddings = self.embed(input_ids, pixels, patches, text, image_sizes)
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs = attention_inputs(self.llm, embeddings, attention_mask, position_ids)
            if labels is not None:
                labels = labels.reshape(inputs["inputs_embeds"].shape[:2])
        inputs["use_cache"] = False
        if labels is None:
            return VlmOutput(None, self.llm(**inputs).logits)
        targets = labels[:, 1:]
        learnt = targets != IGNORE_INDEX
        wanted = targets[learnt]
        total = label_loss(self.llm, inputs, F.pad(learnt, (0, 1)), wanted, self.loss_kernel)
        return VlmOutput(total / (len(wanted) if label_count is None else label_count))

    def embed(
        self,
        input_ids: Int[Tensor, "b t"],
        pixels: Tensor | None,
        patches: Tensor | None = None,
        text: Mapping[str, Tensor] | None = None,
        image_sizes: Int[Tensor, "p 2"] | None = None,
    ) -> Float[Tensor, "b t l"]:
        """Embeddings of text, with the tokens of pictures spliced in.

        While training, text alone runs a blank picture whose tokens count zero times: every rank then calls
        the same modules in the same order, without which ZeRO's collectives would not pair up. So where a
        tower's features are kept, text alone comes with `patches` of no picture.
        """
        is_image = (input_ids == IMAGE_TOKEN_ID) | (input_ids == self.config.image_token_id)
        embeddings: Tensor = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        given = pixels if patches is None else patches
        pictures = 0 if given is None else len(given)
        sizes = self._check_pictures(int(is_image.sum()), pictures, image_sizes)
        if pictures:
            tokens = self._picture_tokens(self._patches(pixels) if patches is None else patches, text, sizes)
            return embeddings.masked_scatter(is_image.unsqueeze(-1), tokens.to(embeddings.dtype))
        if not self.training:
            return embeddings
        settings = self.vision_tower.image_processor.config
        if patches is None:
            blank = self._patches(embeddings.new_zeros(1, 3, settings.height, settings.width))
        else:
            blank = patches.new_zeros(1, *patches.shape[1:])
        if self.projector.reads_text:
            text = {"text_ids": input_ids.new_zeros(1, 1)}
        tokens = self.image_tokens(blank, text)
        if self.tiles is not None:
            size = settings.width, settings.height
            tokens = self.tiles(tokens.expand(self.tiles.form.num_tiles(size), -1, -1), [size])
        return embeddings + 0 * tokens.sum().to(embeddings.dtype)

    def _check_pictures(
        self, slots: int, pictures: int, image_sizes: Tensor | None
    ) -> list[tuple[int, int]] | None:
        """(width, height) of each picture in tiles, of which there are `pictures` in all; None without.

        Raises:
            DataError: image tokens, pictures and sizes do not match.
        """
        if self.tiles is None:
            if slots != pictures * self.tokens_per_image:
                raise DataError(
                    f"{slots} image tokens in the text, but {pictures} pictures of {self.tokens_per_image} "
                    "tokens"
                )
            return None
        if image_sizes is None and pictures:
            raise DataError(
                "this model takes pictures in tiles, whose tokens depend on their size: give image_sizes "
                "too, as `prepare_pictures` and its processor do"
            )
        sizes = [] if image_sizes is None else [(width, height) for height, width in image_sizes.tolist()]
        tiles = sum(map(self.tiles.form.num_tiles, sizes))
        tokens = sum(map(self.tiles.form.num_tokens, sizes))
        if tiles != pictures or tokens != slots:
            raise DataError(
                f"{slots} image tokens in the text and {pictures} tiles, but pictures of image_sizes "
                f"{[f'{width}x{height}' for width, height in sizes]} have {tokens} tokens in {tiles} tiles"
            )
        return sizes

    def _picture_tokens(
        self, patches: Tensor, text: Mapping[str, Tensor] | None, sizes: list[tuple[int, int]] | None
    ) -> Float[Tensor, ...]:
        """The tokens of all pictures in order."""
        if self.tiles is None or sizes is None:
            return self.image_tokens(patches, text)
        if text is not None:
            counts = torch.tensor([self.tiles.form.num_tiles(size) for size in sizes])
            text = {name: rows.repeat_interleave(counts.to(rows.device), 0) for name, rows in text.items()}
        tokens: Tensor = self.tiles(self.image_tokens(patches, text), sizes)
        return tokens

    def _patches(self, pixels: Any) -> Float[Tensor, "p n d"]:
        """What the tower gives; one in which nothing learns builds no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(self.vision_tower)):
            patches: Tensor = self.vision_tower(pixels)
        return patches

    def image_tokens(
        self, patches: Float[Tensor, "p n d"], text: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "p m l"]:
        """What the projector makes of the tower's patches, and of text if it reads that.

        Raises:
            ConfigError: text is missing, or given to a projector that reads none.
        """
        if (text is not None) != self.projector.reads_text:
            raise ConfigError(
                f"the projector {self.projector.config.name!r} reads "
                + ("no text" if text is not None else "what is asked: give `text`, see forward")
            )
        inputs = self.projector.like_weights(patches)
        tokens: Tensor = self.projector(inputs, token_grid(self.vision_tower), **(text or {}))
        return tokens

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """As in torch, but a tower or projector in which nothing learns stays in eval mode."""
        super().train(mode)
        for part in (self.vision_tower, self.projector):
            if not _learns(part):
                part.eval()
        return self

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        pixel_values: Float[Tensor, "p 3 h w"] | None = None,
        text: Mapping[str, Tensor] | None = None,
        image_sizes: Int[Tensor, "p 2"] | None = None,
        **options: Any,
    ) -> Any:
        """Tokens of prompts and what follows, as transformers' `generate` gives them: one batch, cached.

        The language model's own `generate` does the work; a penalty on repeated tokens therefore knows of the
        answer alone.

        Args:
            input_ids: prompts padded on the left, as our processor makes them.
            pixel_values: the pictures of all prompts in order, or all their tiles.
            text, image_sizes: as of `forward`.
            options: of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`, `streamer`,
                `return_dict_in_generate`; without a `generation_config` the model's own, ending where
                answers of its chat template end.

        Returns:
            [B,T+N], or its output object with them as `sequences`.

        Raises:
            DataError: image tokens and pictures do not match.
        """
        was_training = self.training
        self.eval()
        try:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            given = None if pixel_values is None else pixel_values.to(input_ids.device)
            embeddings = self.embed(input_ids, given, text=text, image_sizes=image_sizes)
            settings = self._generation(options)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Passing `repetition_penalty`")  # it is told above
                output = self.llm.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
        finally:
            self.train(was_training)
        new = output if isinstance(output, Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(len(new) // len(input_ids), dim=0)
        sequences = torch.cat([prompts, new], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _generation(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of `generate` as transformers wants them: one config, and what is none of its fields."""
        config: Any = copy.deepcopy(options.get("generation_config"))
        if config is None:
            config = copy.deepcopy(self.generation_config)
            config.eos_token_id, config.pad_token_id = self.chat.stop_ids, self.chat.pad_id
        given = {name: value for name, value in options.items() if name != "generation_config"}
        if not given.get("do_sample", config.do_sample):  # what only sampling reads would be warned of
            given = {**{name: value for name, value in GREEDY.items() if hasattr(config, name)}, **given}
        beside = config.update(**{"use_cache": True, **given})
        return {"generation_config": config, **beside}

    def answer(
        self,
        pixels: Float[Tensor, "p 3 h w"] | None,
        prompts: Sequence[str | Sequence[Turn]],
        max_new_tokens: int = 64,
        *,
        image_sizes: Int[Tensor, "p 2"] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer every prompt, in one batch with a key-value cache; greedy unless `options` say otherwise.

        Args:
            pixels, image_sizes: the pictures of all prompts in order, as `prepare_pictures` gives them.
            prompts: a conversation up to a question, or a question as text. With as many pictures as prompts,
                text without `<image>` is asked about its picture.
            options: for transformers' `generate`, such as `do_sample=True, temperature=0.7`.

        Raises:
            DataError: pictures and `<image>` marks do not match, or a prompt is longer than the language
                model's positions.
        """
        if not prompts:
            return []
        pictures = pixels if image_sizes is None else image_sizes
        paired = pictures is not None and len(pictures) == len(prompts)
        talks = [_as_turns(prompt, paired) for prompt in prompts]
        rows = self._prompts(talks, image_sizes)
        longest = max(map(len, rows))
        places = getattr(self.llm.config, "max_position_embeddings", None)
        if places is not None and longest >= places:
            raise DataError(
                f"a prompt of {longest} tokens, {self.tokens_per_image} of each picture, leaves no room "
                f"for an answer in the {places} positions of the model: ask with fewer words or pictures"
            )
        pad = self.chat.pad_id
        device = next(self.llm.parameters()).device
        input_ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        generated = self.generate(
            input_ids,
            mask,
            pixels,
            self.asked(talks),
            image_sizes,
            max_new_tokens=max_new_tokens,
            **{"do_sample": False, **options},
        )
        answers = self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def stream(
        self,
        pixels: Float[Tensor, "p 3 h w"] | None,
        prompt: str | Sequence[Turn],
        max_new_tokens: int = 64,
        *,
        image_sizes: Int[Tensor, "p 2"] | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Pieces of one answer as they come, word by word; together they are what `answer` gives.

        Arguments and errors are those of `answer`.
        """
        streamer = _Pieces(self.tokenizer, skip_special_tokens=True)
        failed: list[Exception] = []

        def run() -> None:
            try:
                self.answer(
                    pixels, [prompt], max_new_tokens, image_sizes=image_sizes, streamer=streamer, **options
                )
            except Exception as error:  # raised where the pieces are read
                failed.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        begun, held = False, ""  # white space at both ends is no part of an answer
        for piece in streamer:
            text = held + piece if begun else piece.lstrip()
            begun = begun or bool(text)
            held = text[len(text.rstrip()) :]
            if text.rstrip():
                yield text.rstrip()
        thread.join()
        if failed:
            raise failed[0]

    def _prompts(self, talks: Sequence[Sequence[Turn]], image_sizes: Tensor | None) -> list[list[int]]:
        """Tokens of each conversation; of pictures in tiles, as many as their sizes say."""
        if self.tiles is None:
            return [self.chat.prompt(talk) for talk in talks]
        sizes = [] if image_sizes is None else image_sizes.tolist()
        marks = [sum(turn.text.count(IMAGE_TOKEN) for turn in talk) for talk in talks]
        if sum(marks) != len(sizes):
            raise DataError(f"{sum(marks)} {IMAGE_TOKEN} in the prompts, but {len(sizes)} image_sizes")
        counts = iter([self.tiles.form.num_tokens((width, height)) for height, width in sizes])
        return [
            self.chat.prompt(talk, [next(counts) for _ in range(count)])
            for talk, count in zip(talks, marks, strict=True)
        ]

    def asked(self, talks: Sequence[Sequence[Turn]]) -> dict[str, Tensor] | None:
        """The `text` of the pictures of some conversations; None where the projector reads none."""
        if self.instructions is None:
            return None
        rows = [tokens for talk in talks for tokens in self.instructions(talk)]
        device = next(self.llm.parameters()).device
        return {name: value.to(device) for name, value in stack_instructions(rows).items()} if rows else None

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        parts: Collection[Part] | None = None,
    ) -> None:
        """Write `config.json` and a folder for each part, complete or not at all.

        Args:
            parts: which parts, by default all; a folder of some of them is what a training stage leaves for
                the next.

        Raises:
            WeightsError: a tensor is empty, or one did not reach the file.
        """
        parts = self.parts if parts is None else parts
        config: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "architectures": [type(self).__name__],
            "parts": [part for part in self.parts if part in parts],
        }
        if self.tiles is not None:
            config["tiling"] = self.tiles.form.config.model_dump(mode="json")
        with whole_folder(folder) as partial:
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if "tower" in parts:
                self.vision_tower.save_pretrained(partial / "tower")
            if "projector" in parts:
                save_projector(self.projector, partial / "projector")
                if self.instructions is not None:
                    self.instructions.tokenizer.save_pretrained(partial / "projector" / TOKENIZER_FOLDER)
            if "llm" in parts:
                self.llm.save_pretrained(partial / "llm")
                _check_saved(self.llm, partial / "llm")
                self.tokenizer.save_pretrained(partial / "llm")
            if "tiles" in parts and self.tiles is not None:
                save_newline(self.tiles, partial / "tiles")

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, dtype: torch.dtype | str | None = None, **loading: Any
    ) -> VisionLanguageModel:
        """Load a folder or hub id, in eval mode.

        It is one that `save_pretrained` wrote, a `LlavaForConditionalGeneration` or
        `LlavaNextForConditionalGeneration` of transformers (llava-hf), or a model of LLaVA's own code.

        Args:
            dtype: of all parts, or its name; by default, and with `auto`, each as it was saved.
            loading: what transformers' auto classes pass on; any other option is refused.

        Raises:
            ConfigError: no such model, or a part is absent; an option of `from_pretrained` of transformers
                that is not offered.
            WeightsError: weights that do not fit.
        """
        dtype = _dtype(dtype if dtype is not None else loading.pop("torch_dtype", None))
        given = {name for name, value in loading.items() if value is not None and value is not False}
        refused = sorted(given.difference(PASSED_ON))
        if refused:
            raise ConfigError(
                f"{', '.join(refused)}: not offered for a {cls.__name__}; load it, then move it with `to`"
            )
        folder = resolve_folder(source)
        config = _read_config(folder)
        if config.get("model_type") in FOREIGN:
            parts = read_parts(folder, dtype)
            make_saveable(parts.llm)
            model: VisionLanguageModel = cls(*parts[:4], tiling=parts.tiling)
            if model.tiles is not None:
                set_newline(model.tiles, parts.image_newline, folder)
            return model.train(False)
        tiling = config.get("tiling")
        if tiling is not None:
            tiling = validate(TilingConfig, tiling, str(folder / "config.json"))
        _check_model_folder(folder, config)
        tower = VisionTower.from_pretrained(folder / "tower")
        model = cls(
            tower if dtype is None else tower.to(dtype),
            load_projector(folder / "projector", dtype=dtype),
            load_llm(folder / "llm", dtype=dtype),
            load_tokenizer(folder / "llm"),
            load_text_tokenizer(folder / "projector"),
            tiling,
        )
        if model.tiles is not None and "tiles" in model.parts:
            load_newline(model.tiles, folder / "tiles", dtype)
        return model.train(False)


class _Pieces(TextIteratorStreamer):  # type: ignore[misc]
    """Pieces that end with a space, a newline or a Chinese character, all of one text.

    transformers' own begins anew after a newline, where some tokenizers decode the rest without its space.
    """

    print_len: int

    def put(self, value: Tensor) -> None:
        self.token_cache.extend(value.flatten().tolist())
        text = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        ends_whole = text and self._is_chinese_char(ord(text[-1]))
        end = len(text) if ends_whole else max(text.rfind(" "), text.rfind("\n")) + 1
        self.on_finalized_text(text[self.print_len : end])
        self.print_len = max(self.print_len, end)


def token_grid(tower: VisionTower) -> Grid:
    """The grid that a projector sees: the tower's, or one row where a class token makes it no grid."""
    return tower.grid if tower.num_tokens == tower.num_patches else (1, tower.num_tokens)


def embedding_width(llm: nn.Module) -> int:
    """Channels of a token in a language model; known under ZeRO-3 as well."""
    embeddings: Any = llm.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.embedding_dim)


def llm_weight(llm: nn.Module) -> Tensor:
    """One of a language model's weights, to tell its dtype by."""
    return next(parameter for parameter in llm.parameters() if parameter.is_floating_point())


def load_llm(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    weights: Literal["pretrained", "none"] = "pretrained",
) -> nn.Module:
    """A causal language model of transformers, from a folder or hub id.

    Args:
        weights: `none` builds it from its config with random weights.

    Raises:
        ConfigError: it cannot be found or is no causal language model.
        WeightsError: tensors are missing, unexpected or misshapen.
    """
    check_folder(source, "language model")
    if is_vlm_folder(source):
        raise ConfigError(
            f"language model {str(source)!r}: the folder holds a whole vision-language model. "
            f"VisionLanguageModel.from_pretrained({str(source)!r}).save_pretrained(FOLDER) lays its parts "
            "beside each other: tower, projector, llm"
        )
    try:
        if weights == "none":
            config = AutoConfig.from_pretrained(source)
            llm: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
            return llm
        llm, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"language model {str(source)!r} cannot be loaded: {error}") from error
    check_loaded(info, source)
    make_saveable(llm)
    return llm


def check_folder(source: str | Path, what: str) -> None:
    """Tell a path that is not there apart from the id of a hub, which `owner/name` may be.

    Raises:
        ConfigError: such a path.
    """
    text = str(source)
    looks_like_a_path = Path(text).is_absolute() or text.startswith(("./", "../", "~")) or text.count("/") > 1
    if looks_like_a_path and not Path(text).is_dir():
        folders = [str(other) for other in Path(text).parent.glob("*/")]
        raise ConfigError(f"{what} {text!r}: there is no such folder{nearest(text, folders)}")


def make_saveable(llm: Any) -> None:
    """A generation config that transformers loads but will not save (Vicuna's) would lose a finished run."""
    try:
        llm.generation_config.validate(strict=True)
    except ValueError:
        llm.generation_config = GenerationConfig.from_model_config(llm.config)


def load_tokenizer(source: str | Path, chat_template: str | None = None) -> Any:
    """A tokenizer of transformers, with `chat_template` (text) in place of its own where given.

    Raises:
        ConfigError: it cannot be found.
    """
    check_folder(source, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer of {str(source)!r} cannot be loaded: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def with_vocabulary(projector: ProjectorConfig, llm: nn.Module) -> ProjectorConfig:
    """A projector's config with the token ids that it is to know, where it reads text and does not say.

    Raises:
        ConfigError: the tokenizer that it names cannot be found.
    """
    if not isinstance(projector, QFormerTextConfig) or projector.vocab_size is not None:
        return projector
    if projector.tokenizer is not None:
        words = len(load_tokenizer(projector.tokenizer))
    else:
        embeddings: Any = llm.get_input_embeddings()  # type: ignore[operator]
        words = int(embeddings.num_embeddings)
    return projector.model_copy(update={"vocab_size": words})


def load_text_tokenizer(folder: Path) -> Any:
    """The tokenizer that was saved with a projector that reads text; None with others."""
    return load_tokenizer(folder / TOKENIZER_FOLDER) if (folder / TOKENIZER_FOLDER).is_dir() else None


def _instructions(projector: Projector, text_tokenizer: Any, llm_tokenizer: Any) -> Instructions | None:
    config: Any = projector.config
    if not projector.reads_text:
        return None
    if text_tokenizer is None:
        text_tokenizer = llm_tokenizer if config.tokenizer is None else load_tokenizer(config.tokenizer)
    if len(text_tokenizer) > config.vocab_size:
        raise ConfigError(
            f"projector {config.name!r} knows {config.vocab_size} token ids, but the tokenizer of "
            f"instructions has {len(text_tokenizer)}; name another by `tokenizer`, or leave vocab_size out"
        )
    return Instructions(text_tokenizer, config.max_text)


def _as_turns(prompt: str | Sequence[Turn], has_picture: bool) -> Sequence[Turn]:
    if not isinstance(prompt, str):
        return prompt
    mark = f"{IMAGE_TOKEN}\n" if has_picture and IMAGE_TOKEN not in prompt else ""
    return [Turn("user", mark + prompt)]


def _check_saved(llm: nn.Module, folder: Path) -> None:
    """Every element of a language model must be in its files; tied weights are there once."""
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in llm.state_dict().values()}
    saved = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if saved != sum(distinct.values()) or 0 in distinct.values():
        raise WeightsError(
            f"language model not saved: {saved:,} of {sum(distinct.values()):,} weights reached its files"
        )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = folder / "model"
        hint = f"; {inside} is one" if is_vlm_folder(inside) else ""
        raise ConfigError(f"{folder} is no saved vision-language model{hint} ({error})") from error
    return config


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is none of torch; for example bfloat16")
    return found


def _check_model_folder(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("model_type") != MODEL_TYPE:
        raise ConfigError(
            f"{folder}: model_type is {config.get('model_type')!r}, expected {MODEL_TYPE!r}, or "
            f"{', '.join(FOREIGN)} of llava-hf and LLaVA"
        )
    absent = [part for part in PARTS if part not in config["parts"]]
    if absent:
        raise ConfigError(
            f"{folder} holds only {', '.join(config['parts'])}: {', '.join(absent)} is not in it"
        )


AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel)
