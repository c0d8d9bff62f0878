"""BLIP-2's representation stage: a Q-Former that contrasts, matches and captions what it reads of patches.

Queries and text go through one transformer and share its self-attention; three masks make three tasks of it
(arXiv:2301.12597, figure 2):

    ITC  queries see queries, text sees text
    ITM  all see all
    ITG  queries see queries; text sees queries and the text before it

Only the queries look at patches. The modules are transformers' own, under the names that its
`Blip2ForImageTextRetrieval` has for them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, normalize
from transformers import AutoModelForMaskedLM, BertConfig, Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.bert.modeling_bert import BertPredictionHeadTransform
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from vlm_vision.adapters.build import write_projector
from vlm_vision.adapters.config import Grid
from vlm_vision.adapters.qformer import QFormerProjector, library_config
from vlm_vision.adapters.qformer_config import QFormerConfig
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.files import whole_folder
from vlm_vision.train.caption_tokenizer import CaptionTokenizer

MODEL_TYPE = "vlm_vision_qformer_representation"
INIT_STD = 0.02  # of BERT, for embeddings and for what predicts words
# A vocabulary grows by new tokens, and may be shorter than its table; places beyond the text are not used.
RESIZED = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight", "lm_bias")


class RepresentationModel(nn.Module):
    """A Q-Former with text: patches and token ids in, states of queries and of text out.

    Token ids are `[CLS] text [SEP]`, and padding, as `CaptionTokenizer` gives them.

    Attributes:
        config, in_features, grid: as of the projector that it prepares.
        query_tokens, qformer: what `projector` takes from here.
        embeddings: of words and their places.
        vision_projection, text_projection: into the space where pictures and texts are contrasted.
        logit_scale: log of the factor on similarities.
        itm_head: no match, match.
        lm_transform, lm_bias: with the embeddings of words, what predicts the next one.
    """

    def __init__(
        self,
        config: QFormerConfig,
        in_features: int,
        grid: Grid,
        tokenizer: CaptionTokenizer,
        *,
        embed_dim: int = 256,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        self.config, self.in_features, self.grid, self.tokenizer = config, in_features, grid, tokenizer
        self.embed_dim, width, words = embed_dim, config.hidden_size, len(tokenizer)
        library: Blip2QFormerConfig = library_config(
            config, in_features, use_qformer_text_input=True, vocab_size=words, pad_token_id=tokenizer.pad_id
        )
        self.query_tokens = nn.Parameter(INIT_STD * torch.randn(1, config.num_queries, width))
        self.qformer = Blip2QFormerModel(library)
        self.embeddings = Blip2TextEmbeddings(library)
        self.lm_transform = BertPredictionHeadTransform(
            BertConfig(hidden_size=width, hidden_act="gelu", layer_norm_eps=library.layer_norm_eps)
        )
        for module in (*self.embeddings.children(), self.lm_transform.dense):
            nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(self.lm_transform.dense.bias)
        self.lm_bias = nn.Parameter(torch.zeros(words))
        self.vision_projection, self.text_projection = (nn.Linear(width, embed_dim) for _ in range(2))
        self.itm_head = nn.Linear(width, 2)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self._queries_start_as_text()

    def _queries_start_as_text(self) -> None:
        """The perceptron of queries starts with the weights of that of text (LAVIS, `Blip2Qformer`)."""
        for layer in self.qformer.encoder.layer:
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    # --- The three ways to read

    def is_text(self, ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """Where there is no padding."""
        return ids != self.tokenizer.pad_id

    def queries(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b q h"]:
        """States of queries, which see no text: what the projector goes on with."""
        states: Tensor = self.qformer(
            query_embeds=self.query_tokens.expand(len(patches), -1, -1), encoder_hidden_states=patches
        ).last_hidden_state
        return states

    def embed_queries(self, states: Float[Tensor, "b q h"]) -> Float[Tensor, "b q e"]:
        """Unit embeddings of a picture, one for each query."""
        return normalize(self.vision_projection(states).float(), dim=-1)

    def embed_texts(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b e"]:
        """Unit embeddings of texts, which see no picture: of `[CLS]`."""
        states = self.qformer(
            query_embeds=self.embeddings(ids), query_length=0, attention_mask=self.is_text(ids).long()
        ).last_hidden_state
        return normalize(self.text_projection(states[:, 0]).float(), dim=-1)

    def match(self, patches: Float[Tensor, "b n d"], ids: Int[Tensor, "b t"]) -> Float[Tensor, "b 2"]:
        """Logits of no match and of a match: the mean over queries, which see the text and are seen."""
        is_text = self.is_text(ids)
        seen = torch.cat([is_text.new_ones(len(ids), self.config.num_queries), is_text], dim=1)
        logits: Tensor = self.itm_head(self._both(patches, ids, seen.long())[0])
        return logits.float().mean(dim=1)

    def write(
        self, patches: Float[Tensor, "b n d"], ids: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b q h"], Float[Tensor, "b t h"]]:
        """States of queries, which see no text, and of text, which sees them and what of it comes before.

        The first are those of `queries`, so that one pass serves ITC and ITG. LAVIS keeps keys and values of
        the queries instead, and lets the text look at them afterwards: the same sums.
        """
        count, is_text = self.config.num_queries, self.is_text(ids)
        size = count + ids.shape[1]
        sees = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
        sees[:count, :count] = True
        shown = torch.cat([is_text.new_ones(len(ids), count), is_text], dim=1)
        seen = rearrange(shown, "b s -> b 1 1 s") & sees
        # Added to scores it means the same to every kernel; transformers takes a mask of four axes as it is.
        return self._both(
            patches, ids, torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, -torch.inf)
        )

    def words(self, states: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        """Logits of the next token."""
        return linear(self.lm_transform(states), self.embeddings.word_embeddings.weight, self.lm_bias)

    def _both(self, patches: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.query_tokens.expand(len(ids), -1, -1)
        states = self.qformer(
            query_embeds=self.embeddings(ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=patches,
        ).last_hidden_state
        return states[:, : queries.shape[1]], states[:, queries.shape[1] :]

    # --- What is kept

    def save_projector(self, folder: str | Path) -> None:
        """The `qformer` projector that `align` takes as `projector_weights`.

        As in BLIP-2 its last layer, `language_projection`, is new in the generative stage, which knows the
        language model's width; the text's perceptrons are left out there. All weights: `save_pretrained`.

        Raises:
            WeightsError: a tensor is empty.
        """
        with torch.device("meta"):
            wanted = QFormerProjector(self.config, self.in_features, 1, self.grid).state_dict()
        state = self.state_dict()
        output = f"{QFormerProjector.output_layer}."
        kept = {name: state[name] for name in wanted if not name.startswith(output)}
        write_projector(folder, kept, self.config, self.in_features, None, self.grid)

    def save_pretrained(self, folder: str | Path) -> None:
        """Everything: `config.json`, `model.safetensors` and the tokenizer, complete or not at all."""
        description = {
            "model_type": MODEL_TYPE,
            "qformer": self.config.model_dump(mode="json"),
            "in_features": self.in_features,
            "grid": list(self.grid),
            "embed_dim": self.embed_dim,
            "max_text_tokens": self.tokenizer.context_length,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        with whole_folder(folder) as partial:
            (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, partial / "model.safetensors")
            self.tokenizer.save_pretrained(partial / "tokenizer")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RepresentationModel:
        """The model that `save_pretrained` wrote, in eval mode.

        Raises:
            WeightsError: no such model, or weights that do not fit.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{folder} holds no Q-Former with text: {error}") from error
        if description.get("model_type") != MODEL_TYPE:
            raise WeightsError(f"{folder} holds a {description.get('model_type')!r}, not a {MODEL_TYPE!r}")
        model = cls(
            QFormerConfig(**description["qformer"]),
            description["in_features"],
            tuple(description["grid"]),
            CaptionTokenizer(folder / "tokenizer", description["max_text_tokens"]),
            embed_dim=description["embed_dim"],
        )
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{folder}: the weights do not fit the config: {error}") from error
        return model.eval()

    @torch.no_grad()
    def load_bert(self, source: str | Path) -> None:
        """Start text and self-attention from a BERT, as BLIP-2 does (LAVIS, `init_Qformer`).

        Cross-attention and queries stay random, as do tokens that BERT does not have; BERT's embeddings of
        token types, which tell two sentences apart, have no place here.

        Raises:
            ConfigError: it cannot be loaded, or is no BERT.
            WeightsError: its sizes are others; lists what does not fit.
        """
        try:
            bert = AutoModelForMaskedLM.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"BERT {str(source)!r} cannot be loaded: {error}") from error
        if bert.config.model_type != "bert":
            raise ConfigError(f"{str(source)!r} is a {bert.config.model_type}, and only a BERT fits here")
        if bert.config.num_hidden_layers != self.config.layers:
            raise WeightsError(
                f"BERT {str(source)!r} has {bert.config.num_hidden_layers} layers, the Q-Former "
                f"{self.config.layers}: set qformer.layers, or bert to null"
            )
        state, pairs, problems = bert.state_dict(), [], []
        for name, target in self.named_parameters():
            if (other := _name_in_bert(name)) is None:
                continue
            given = state[other]
            pairs.append((target, given))
            if target.shape[1:] != given.shape[1:] or (len(target) != len(given) and name not in RESIZED):
                problems.append(f"{other} is {tuple(given.shape)}, expected {tuple(target.shape)}")
        if problems:
            raise WeightsError(f"BERT {str(source)!r} does not fit: {'; '.join(problems)}")
        for target, given in pairs:
            rows = min(len(target), len(given))
            target[:rows] = given[:rows]


def _name_in_bert(name: str) -> str | None:
    """What a parameter is called in `BertForMaskedLM`; None where BERT has nothing like it."""
    name = name.replace("intermediate_query.", "intermediate.").replace("output_query.", "output.")
    if "crossattention" in name:
        return None
    for ours, theirs in (
        ("qformer.encoder.", "bert.encoder."),
        ("qformer.layernorm.", "bert.embeddings.LayerNorm."),
        ("embeddings.", "bert.embeddings."),
        ("lm_transform.", "cls.predictions.transform."),
        ("lm_bias", "cls.predictions.bias"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours).replace("attention.attention.", "attention.self.")
    return None


def similarities(images: Float[Tensor, "b q e"], texts: Float[Tensor, "c e"]) -> Float[Tensor, "b c"]:
    """Of each picture and text: that of the query which is nearest to the text; in fp32, whatever is cast."""
    with torch.autocast(images.device.type, enabled=False):
        nearest: Tensor = einsum(images, texts, "b q e, c e -> b c q").amax(dim=-1)
    return nearest
