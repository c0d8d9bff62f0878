"""The three objectives against LAVIS' own code, and the scores against transformers' retrieval model.

VLM_VISION_PROJECTOR_REFERENCES is a folder that holds a checkout of salesforce/LAVIS; without it LAVIS is not
compared.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from qformers import LENGTH, QFORMER, TEXTS, WIDTH, tiny_batch, tiny_representation
from references import checkout
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, pytorch_utils

from vlm_vision.train.representation import RepresentationModel, similarities
from vlm_vision.train.representation_config import ObjectiveConfig
from vlm_vision.train.representation_objective import RepresentationObjective, gumbel_noise

REFERENCES = "VLM_VISION_PROJECTOR_REFERENCES"


@pytest.fixture
def model(tmp_path: Path) -> RepresentationModel:
    return tiny_representation(tmp_path)


# --- LAVIS


class OldPreTrainedModel(nn.Module):
    """What LAVIS' Q-Former calls of transformers 4.15's base class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def init_weights(self) -> None:
        """As they are: every weight is loaded."""

    def get_head_mask(self, head_mask: None, layers: int) -> list[None]:
        return [None] * layers

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * -10000.0


def _stub(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(content)
    return module


@contextmanager
def _modules(stubs: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def lavis() -> tuple[ModuleType, ModuleType]:
    """`Qformer` and `blip2_qformer` of the checkout, for one process; what else they import is a stand-in."""
    folder = checkout(REFERENCES) / "LAVIS" / "lavis" / "models" / "blip2_models"

    def same(tensor: Tensor) -> Tensor:
        return tensor

    def register_model(name: str) -> Any:
        return lambda model: model

    import transformers.modeling_outputs

    old_utils = {"PreTrainedModel": OldPreTrainedModel, "prune_linear_layer": None}
    old_utils |= {"find_pruneable_heads_and_indices": None}
    old_utils["apply_chunking_to_forward"] = pytorch_utils.apply_chunking_to_forward
    stubs = {
        "transformers.file_utils": _stub("transformers.file_utils", ModelOutput=dict),
        "transformers.modeling_utils": _stub("transformers.modeling_utils", **old_utils),
        "transformers.modeling_outputs": transformers.modeling_outputs,
        "lavis": _stub("lavis"),
        "lavis.common": _stub("lavis.common"),
        "lavis.common.registry": _stub(
            "lavis.common.registry", registry=SimpleNamespace(register_model=register_model)
        ),
        "lavis.models": _stub("lavis.models"),
        "lavis.models.base_model": _stub(
            "lavis.models.base_model", all_gather_with_grad=same, concat_all_gather=same
        ),
        "lavis.models.blip2_models": _stub("lavis.models.blip2_models"),
        "lavis.models.blip2_models.blip2": _stub(
            "lavis.models.blip2_models.blip2",
            Blip2Base=nn.Module,
            compute_sim_matrix=None,
            disabled_train=None,
        ),
        "lavis.models.blip_models": _stub("lavis.models.blip_models"),
        "lavis.models.blip_models.blip_outputs": _stub(
            "lavis.models.blip_models.blip_outputs", BlipOutput=SimpleNamespace, BlipOutputFeatures=None
        ),
    }
    stubs["lavis.models.blip2_models"].__path__ = [str(folder)]  # type: ignore[attr-defined]
    names = [f"lavis.models.blip2_models.{name}" for name in ("Qformer", "blip2_qformer")]
    with _modules(stubs):
        try:
            qformer, blip2 = (importlib.import_module(name) for name in names)
        finally:
            for name in names:
                sys.modules.pop(name, None)
    blip2.dist = SimpleNamespace(get_rank=lambda: 0)  # type: ignore[attr-defined]
    return qformer, blip2


def name_in_lavis(name: str) -> str:
    name = name.replace("attention.attention.", "attention.self.")
    for ours, theirs in (
        ("qformer.encoder.", "Qformer.bert.encoder."),
        ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
        ("embeddings.", "Qformer.bert.embeddings."),
        ("lm_transform.", "Qformer.cls.predictions.transform."),
        ("lm_bias", "Qformer.cls.predictions.bias"),
        ("vision_projection.", "vision_proj."),
        ("text_projection.", "text_proj."),
        ("logit_scale", "temp"),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def as_lavis(model: RepresentationModel) -> Any:
    """LAVIS' model with our weights; pictures are given as patches."""
    qformer, blip2 = lavis()
    settings = SimpleNamespace(
        vocab_size=len(model.tokenizer),
        pad_token_id=model.tokenizer.pad_id,
        max_position_embeddings=512,
        hidden_size=QFORMER["hidden_size"],
        num_hidden_layers=QFORMER["layers"],
        num_attention_heads=QFORMER["heads"],
        intermediate_size=4 * QFORMER["hidden_size"],
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-12,
        chunk_size_feed_forward=0,
        add_cross_attention=True,
        cross_attention_freq=2,
        encoder_width=WIDTH,
        query_length=QFORMER["num_queries"],
        use_return_dict=True,
        output_attentions=False,
        output_hidden_states=False,
    )
    theirs = blip2.Blip2Qformer.__new__(blip2.Blip2Qformer)
    nn.Module.__init__(theirs)
    theirs.tokenizer, theirs.max_txt_len = model.tokenizer.library, LENGTH
    theirs.visual_encoder = theirs.ln_vision = nn.Identity()
    theirs.Qformer = qformer.BertLMHeadModel(settings)
    theirs.Qformer.cls.predictions.decoder.weight = theirs.Qformer.bert.embeddings.word_embeddings.weight
    theirs.query_tokens = nn.Parameter(torch.empty_like(model.query_tokens))
    width = QFORMER["hidden_size"]
    theirs.vision_proj, theirs.text_proj = nn.Linear(width, 10), nn.Linear(width, 10)
    theirs.itm_head, theirs.temp = nn.Linear(width, 2), nn.Parameter(torch.empty(()))
    targets = dict(theirs.named_parameters())
    assert {name_in_lavis(name) for name, _ in model.named_parameters()} == targets.keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = (-parameter).exp() if name == "logit_scale" else parameter
            targets[name_in_lavis(name)].copy_(value)
    return theirs.eval()


@pytest.mark.parametrize("shares_pictures", [False, True], ids=["pretraining", "captions share pictures"])
def test_losses_and_gradients_are_those_of_lavis(
    model: RepresentationModel, shares_pictures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = as_lavis(model)
    patches, ids, identities = tiny_batch(model)
    samples: dict[str, Any] = {"image": patches, "text_input": list(TEXTS)}
    if shares_pictures:
        identities = torch.tensor([0, 1, 2, 0, 3, 2])[:, None]
        samples["image_id"] = identities[:, 0]
    noise = gumbel_noise(len(ids), seed=3, step=5)
    # LAVIS draws a picture for each text, then a text for each picture.
    rows = iter((*noise[1], *noise[0]))
    monkeypatch.setattr(torch, "multinomial", lambda weights, _: (weights.log() + next(rows)).argmax()[None])
    expected = theirs(samples)
    losses = {"itc": expected.loss_itc, "itm": expected.loss_itm, "itg": expected.loss_lm}
    named = dict(theirs.named_parameters())
    worst = {"loss": 0.0, "gradient": 0.0}
    for name in (*losses, "all"):
        weights = {other: float(name in (other, "all")) for other in losses}
        model.zero_grad(set_to_none=True)
        outcome = RepresentationObjective(model, ObjectiveConfig(**weights))(patches, ids, identities, noise)
        outcome.total.backward()
        theirs.zero_grad(set_to_none=True)
        loss = expected.loss if name == "all" else losses[name]
        loss.backward(retain_graph=True)
        worst["loss"] = max(worst["loss"], float(((outcome.total - loss) / loss).detach().abs()))
        for ours, parameter in model.named_parameters():
            found, wanted = parameter.grad, named[name_in_lavis(ours)].grad
            assert found is not None
            if wanted is None:
                assert not found.any(), ours
                continue
            if ours == "logit_scale":  # theirs is the temperature itself
                wanted = -wanted * named["temp"].detach()
            if ours.endswith("key.bias"):  # 0 but for rounding: all scores of a query shift alike
                continue
            error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-4))
            worst["gradient"] = max(worst["gradient"], error)
    assert worst["loss"] < 2e-6  # worst measured: 3.1e-7
    assert worst["gradient"] < 3e-5  # worst measured: 6.0e-6, of a parameter's largest


# --- transformers


def as_transformers(model: RepresentationModel) -> Any:
    """Its retrieval model with our weights, around a vision model that is never asked."""
    settings = Blip2QFormerConfig(**{**model.qformer.config.to_dict(), "attn_implementation": "eager"})
    vision = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        qformer_config=settings.to_dict(),
        vision_config={**vision, "image_size": 4, "patch_size": 2},
        num_query_tokens=QFORMER["num_queries"],
        image_text_hidden_size=10,
    )
    config.image_token_index = None
    theirs = Blip2ForImageTextRetrieval(config).eval()
    state = model.state_dict()
    beside = {"logit_scale", "lm_bias"}
    wanted = {name for name in state if name not in beside and not name.startswith("lm_transform.")}
    result = theirs.load_state_dict({name: state[name] for name in wanted}, strict=False)
    assert result.unexpected_keys == []
    assert all(name.startswith("vision_model.") for name in result.missing_keys)
    return theirs


def test_scores_are_those_of_transformers_retrieval_model(model: RepresentationModel) -> None:
    theirs = as_transformers(model)
    patches, ids, _ = tiny_batch(model)
    mask = model.is_text(ids).long()

    class Seen(nn.Module):
        def forward(self, pixel_values: Tensor, **_: Any) -> tuple[Tensor]:
            return (pixel_values,)

    theirs.vision_model = Seen()
    inputs = {"pixel_values": patches, "input_ids": ids, "attention_mask": mask, "return_dict": False}
    with torch.no_grad():
        itc = theirs(**inputs)[0]
        itm = theirs(**inputs, use_image_text_matching_head=True)[0]
        found = similarities(model.embed_queries(model.queries(patches)), model.embed_texts(ids))
        assert float((found - itc).abs().max()) < 1e-6  # measured: 0, as below
        assert float((model.match(patches, ids) - itm).abs().max()) < 1e-6
        states = theirs.qformer(
            query_embeds=theirs.query_tokens.expand(len(ids), -1, -1), encoder_hidden_states=patches
        ).last_hidden_state
        theirs_embedded = normalize(theirs.vision_projection(states), dim=-1)
        beside_text = model.embed_queries(model.write(patches, ids)[0])
    assert float((beside_text - theirs_embedded).abs().max()) < 1e-6  # worst measured: 2e-7
