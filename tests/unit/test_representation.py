"""The Q-Former with text: what sees what, which pairs are wrong ones, and what is kept of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qformers import GRID, LENGTH, QFORMER, TEXTS, WIDTH, bert_tokenizer, tiny_batch, tiny_representation
from tiny import tiny_llm, tiny_tower
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from vlm_vision.adapters import build_projector
from vlm_vision.adapters.build import load_projector, load_projector_weights
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, DataError, WeightsError
from vlm_vision.train.align import build_model
from vlm_vision.train.align_config import AlignConfig
from vlm_vision.train.caption_tokenizer import CaptionTokenizer
from vlm_vision.train.representation import RepresentationModel, similarities
from vlm_vision.train.representation_config import ObjectiveConfig, RepresentationConfig
from vlm_vision.train.representation_objective import (
    Outcome,
    RepresentationObjective,
    gumbel_noise,
    whole_batch,
)
from vlm_vision.train.representation_scores import recalls


@pytest.fixture
def model(tmp_path: Path) -> RepresentationModel:
    return tiny_representation(tmp_path)


# --- What sees what


def moved(before: Tensor, after: Tensor) -> Tensor:
    """For each position, whether anything of it changed."""
    return ((before - after).abs() > 1e-6).any(dim=-1).any(dim=0)


@torch.no_grad()
def test_contrasted_text_sees_no_picture_and_the_picture_no_text(model: RepresentationModel) -> None:
    patches, ids, _ = tiny_batch(model)
    other = ids.clone()
    other[:, 1] = (ids[:, 1] + 1) % 10
    # The picture's embedding comes from a pass with the text that is to be written, and must not know it.
    assert torch.equal(model.write(patches, ids)[0], model.write(patches, other)[0])
    assert torch.allclose(model.write(patches, ids)[0], model.queries(patches), rtol=0, atol=1e-5)
    assert moved(model.queries(patches), model.queries(patches + 0.1)).all()
    assert moved(model.embed_texts(ids)[None], model.embed_texts(other)[None]).all()


@torch.no_grad()
def test_matching_sees_all_both_ways(model: RepresentationModel) -> None:
    patches, ids, _ = tiny_batch(model)
    before = model.match(patches, ids)
    for place in range(LENGTH):
        other = ids.clone()
        other[:, place] = torch.where(
            model.is_text(ids)[:, place], (ids[:, place] + 1) % 10 + 1, other[:, place]
        )
        changed = ((model.match(patches, other) - before).abs() > 1e-6).any(dim=1)
        assert torch.equal(changed, model.is_text(ids)[:, place]), place
    assert moved(before[None], model.match(patches + 0.1, ids)[None]).all()


@torch.no_grad()
def test_written_text_sees_queries_and_what_comes_before_it(model: RepresentationModel) -> None:
    patches, ids, _ = tiny_batch(model)
    row = slice(1, 2)  # whose text fills all places
    patches, ids = patches[row], ids[row]
    assert model.is_text(ids).all()
    before = model.write(patches, ids)[1]
    for place in range(LENGTH):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % 10 + 1
        changed = moved(before, model.write(patches, other)[1]).tolist()
        assert changed == [number >= place for number in range(LENGTH)]
    assert moved(before, model.write(patches + 0.1, ids)[1]).all()


@torch.no_grad()
def test_padding_changes_nothing(model: RepresentationModel) -> None:
    patches, ids, _ = tiny_batch(model)
    short, long = ids[2:3, :3], ids[2:3]  # [CLS] green [SEP]
    assert model.is_text(short).all()
    assert not model.is_text(long)[:, 3:].any()
    one = patches[2:3]
    for found, expected in (
        (model.embed_texts(long), model.embed_texts(short)),
        (model.match(one, long), model.match(one, short)),
        (model.write(one, long)[0], model.write(one, short)[0]),
        (model.write(one, long)[1][:, :3], model.write(one, short)[1]),
    ):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_fused_attention_computes_what_plain_attention_does(model: RepresentationModel) -> None:
    patches, ids, _ = tiny_batch(model)
    found: dict[str, list[Tensor]] = {}
    for kind in ("eager", "sdpa"):
        model.qformer.set_attn_implementation(kind)
        found[kind] = [*model.write(patches, ids), model.match(patches, ids), model.embed_texts(ids)]
    assert model.qformer.config._attn_implementation == "sdpa"
    for plain, fused in zip(*found.values(), strict=True):
        assert torch.allclose(plain, fused, rtol=0, atol=1e-5)


# --- Objectives


def outcome(model: RepresentationModel, identities: Tensor, step: int = 1, **weights: float) -> Outcome:
    patches, ids, _ = tiny_batch(model, len(identities))
    objective = RepresentationObjective(model, ObjectiveConfig(**weights))
    result: Outcome = objective(patches, ids, identities, gumbel_noise(len(ids), 0, step))
    return result


def test_wrong_pairs_are_drawn_by_similarity_and_never_say_the_same(
    model: RepresentationModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities = torch.tensor([0, 1, 2, 0, 3, 4])[:, None]
    patches, ids, _ = tiny_batch(model)
    numbers = {tuple(row.tolist()): number for number, row in enumerate(ids)}
    drawn = torch.zeros(2, 6, 6)
    take = RepresentationModel.match

    def keep(self: RepresentationModel, pictures: Tensor, texts: Tensor) -> Tensor:
        assert torch.equal(pictures[:6], patches)
        assert torch.equal(texts[:12], torch.cat([ids, ids])[:, : texts.shape[1]])
        assert torch.equal(pictures[12:], patches)
        for own, text in enumerate(texts[12:]):
            drawn[0, own, numbers[tuple(text.tolist())]] += 1
        for own, picture in enumerate(pictures[6:12]):
            drawn[1, own, int((patches == picture).all(dim=2).all(dim=1).nonzero())] += 1
        return take(self, pictures, texts)

    monkeypatch.setattr(RepresentationModel, "match", keep)
    steps = 250
    with torch.no_grad():
        for step in range(steps):
            outcome(model, identities, step)
        scale = model.logit_scale.exp()
        scores = scale * similarities(model.embed_queries(model.queries(patches)), model.embed_texts(ids))
    is_same = identities == identities.T
    for found, expected in zip(drawn, (scores, scores.T), strict=True):
        share = expected.masked_fill(is_same, -torch.inf).softmax(dim=1)
        assert not found[is_same].any()
        assert float((found / steps - share).abs().max()) < 0.13  # 4 deviations of a share of a half


def test_a_batch_of_pairs_that_say_the_same_is_refused(model: RepresentationModel) -> None:
    with pytest.raises(DataError, match="raise batch_size"):
        outcome(model, torch.zeros(4, 1, dtype=torch.long))


def test_pairs_that_say_the_same_share_the_target(model: RepresentationModel) -> None:
    apart = outcome(model, torch.arange(6)[:, None])
    by_caption = outcome(model, torch.tensor([[0, 9], [1, 8], [0, 7], [2, 6], [3, 5], [4, 4]]))
    by_picture = outcome(model, torch.tensor([[9, 0], [8, 1], [7, 0], [6, 2], [5, 3], [4, 4]]))
    assert float(by_caption.itc) == float(by_picture.itc) != float(apart.itc)


@pytest.mark.parametrize("name", ["itc", "itm", "itg"])
def test_each_objective_teaches_the_whole_way_to_it(model: RepresentationModel, name: str) -> None:
    weights = {"itc": 0.0, "itm": 0.0, "itg": 0.0, name: 1.0}
    outcome(model, torch.arange(6)[:, None], **weights).total.backward()
    learns = {other for other, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    heads = {
        "itc": {"vision_projection.weight", "text_projection.weight", "logit_scale"},
        "itm": {"itm_head.weight"},
        "itg": {"lm_transform.dense.weight", "lm_bias"},
    }
    assert heads[name] <= learns
    assert not learns & set().union(*(heads[other] for other in heads if other != name))
    last = f"qformer.encoder.layer.{QFORMER['layers'] - 1}."
    reached = {
        "query_tokens",
        "qformer.encoder.layer.0.crossattention.attention.key.weight",
        "qformer.encoder.layer.0.intermediate.dense.weight",
        "embeddings.word_embeddings.weight",
    }
    assert reached <= learns
    assert (f"{last}intermediate_query.dense.weight" in learns) == (name != "itg")
    assert (f"{last}intermediate.dense.weight" in learns) == (name != "itm")


def test_three_objectives_are_learnt_together(tmp_path: Path) -> None:
    model = tiny_representation(tmp_path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = last = outcome(model, torch.arange(6)[:, None])
    for step in range(50):
        last = outcome(model, torch.arange(6)[:, None], step)
        optimizer.zero_grad()
        last.total.backward()
        optimizer.step()
    assert float(last.itc_accuracy) == 1
    assert float(last.itm_accuracy) > 0.9
    assert float(last.itg) < 0.6 * float(first.itg)


def test_one_process_is_a_batch_in_its_own_order() -> None:
    rows = torch.randn(5, 2, 3)
    assert torch.equal(whole_batch(rows), rows)


# --- Tokenizer


def test_tokens_are_those_of_bert_with_dec_as_the_one_that_is_new(tmp_path: Path) -> None:
    tokenizer = CaptionTokenizer(bert_tokenizer(tmp_path), LENGTH)
    library = AutoTokenizer.from_pretrained(tmp_path)
    expected = library(
        list(TEXTS), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    assert torch.equal(tokenizer(list(TEXTS)), expected["input_ids"])
    assert len(tokenizer) == len(library) + 1 == tokenizer.dec_id + 1
    longer = " ".join(TEXTS)
    assert tokenizer.is_truncated(longer)
    assert not tokenizer.is_truncated(TEXTS[1])
    assert tokenizer(longer)[0, -1] == library.sep_token_id


def test_a_language_models_tokenizer_gets_the_marks_that_it_lacks(tmp_path: Path) -> None:
    source = tiny_llm(tmp_path / "llm")
    tokenizer = CaptionTokenizer(source, LENGTH)
    library = AutoTokenizer.from_pretrained(source)
    (ids,) = tokenizer("red picture").tolist()
    assert tokenizer.library.convert_ids_to_tokens(ids[:4]) == ["[CLS]", "red", "picture", "</s>"]
    assert ids[4:] == [library.pad_token_id] * 4
    assert len(tokenizer) == len(library) + 2
    tokenizer.save_pretrained(tmp_path / "saved")
    again = CaptionTokenizer(tmp_path / "saved", LENGTH)
    assert (again("red picture").tolist(), again.dec_id, len(again)) == (
        [ids],
        tokenizer.dec_id,
        len(tokenizer),
    )


def test_padding_never_hides_the_end_of_a_text(tmp_path: Path) -> None:
    library = AutoTokenizer.from_pretrained(tiny_llm(tmp_path / "llm"))
    library.pad_token = library.eos_token
    library.save_pretrained(tmp_path / "tokenizer")
    tokenizer = CaptionTokenizer(tmp_path / "tokenizer", LENGTH)
    (ids,) = tokenizer("red").tolist()
    assert ids[2] == library.eos_token_id != tokenizer.pad_id == ids[3]


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        CaptionTokenizer(tmp_path / "absent", LENGTH)


# --- A start from BERT


def tiny_bert(folder: Path, **changes: Any) -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        bert = BertForMaskedLM(BertConfig(vocab_size=13, **{**sizes, **changes})).eval()
    bert.save_pretrained(folder)
    return bert


@torch.no_grad()
def test_from_berts_weights_text_is_read_as_bert_reads_it(model: RepresentationModel, tmp_path: Path) -> None:
    bert = tiny_bert(tmp_path / "bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    bert.bert.embeddings.token_type_embeddings.weight.zero_()  # which has no place in a Q-Former
    model.load_bert(tmp_path / "bert")
    ids, mask = (part := tiny_batch(model)[1]), model.is_text(part)
    states = model.qformer(
        query_embeds=model.embeddings(ids), query_length=0, attention_mask=mask.long()
    ).last_hidden_state
    expected = bert(ids, attention_mask=mask.long(), output_hidden_states=True)
    assert float((states - expected.hidden_states[-1])[mask].abs().max()) < 1e-5  # worst measured: 1e-6
    assert float((model.words(states)[..., :13] - expected.logits)[mask].abs().max()) < 1e-5
    for layer in model.qformer.encoder.layer:
        for text, query in (
            (layer.intermediate, layer.intermediate_query),
            (layer.output, layer.output_query),
        ):
            pairs = zip(text.parameters(), query.parameters(), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    for name in ("query_tokens", "qformer.encoder.layer.0.crossattention.attention.key.weight"):
        assert torch.equal(dict(model.named_parameters())[name], before[name])
    assert torch.equal(
        model.embeddings.word_embeddings.weight[13:], before["embeddings.word_embeddings.weight"][13:]
    )


def test_another_berts_sizes_are_told(model: RepresentationModel, tmp_path: Path) -> None:
    tiny_bert(tmp_path / "deep", num_hidden_layers=2)
    tiny_bert(tmp_path / "wide", hidden_size=8, intermediate_size=64)
    with pytest.raises(WeightsError, match="has 2 layers, the Q-Former 3"):
        model.load_bert(tmp_path / "deep")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        WeightsError, match=r"bert\.embeddings\.LayerNorm\.weight is \(8,\), expected \(16,\)"
    ):
        model.load_bert(tmp_path / "wide")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match="cannot be loaded"):
        model.load_bert(tmp_path / "absent")


def test_the_perceptron_of_queries_starts_as_that_of_text(tmp_path: Path) -> None:
    tokenizer = CaptionTokenizer(bert_tokenizer(tmp_path), LENGTH)
    config = tiny_representation(tmp_path).config
    fresh = RepresentationModel(config, WIDTH, GRID, tokenizer)
    for layer in fresh.qformer.encoder.layer:
        assert torch.equal(layer.intermediate.dense.weight, layer.intermediate_query.dense.weight)
        assert torch.equal(layer.output.dense.weight, layer.output_query.dense.weight)
    assert float(fresh.logit_scale.detach().exp()) == pytest.approx(1 / 0.07)
    assert float(fresh.lm_transform.dense.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


# --- What is kept


def test_the_whole_model_comes_back(model: RepresentationModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    loaded = RepresentationModel.from_pretrained(tmp_path / "saved")
    assert (loaded.config, loaded.grid, loaded.in_features) == (model.config, model.grid, model.in_features)
    patches, ids, _ = tiny_batch(model)
    assert torch.equal(loaded.tokenizer(list(TEXTS)), ids)
    assert torch.equal(loaded.match(patches, ids), model.match(patches, ids))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match="holds no Q-Former with text"):
        RepresentationModel.from_pretrained(tmp_path)


def test_the_projector_gives_the_same_queries_and_a_new_last_layer(
    model: RepresentationModel, tmp_path: Path
) -> None:
    model.save_projector(tmp_path / "projector")
    patches = tiny_batch(model)[0]
    torch.manual_seed(7)
    projector = build_projector(model.config, WIDTH, 40, GRID).eval()
    new = projector.language_projection.weight.detach().clone()
    load_projector_weights(projector, tmp_path / "projector")
    assert torch.equal(projector.language_projection.weight, new)
    with torch.no_grad():
        expected = projector.language_projection(model.queries(patches))
        assert torch.equal(projector(patches), expected)
    for other in (32, 40):  # any language model
        load_projector_weights(build_projector(model.config, WIDTH, other, GRID), tmp_path / "projector")
    with pytest.raises(WeightsError, match="without the layer to a language model"):
        load_projector(tmp_path / "projector")
    with pytest.raises(WeightsError, match=r"missing language_projection\.bias"):
        load_projector_weights(projector, tmp_path / "projector" / "model.safetensors")
    wider = model.config.model_copy(update={"num_queries": 5})
    with pytest.raises(WeightsError, match=r"query_tokens is \(1, 4, 16\), expected \(1, 5, 16\)"):
        load_projector_weights(build_projector(wider, WIDTH, 40, GRID), tmp_path / "projector")
    with pytest.raises(WeightsError, match="does not fit the projector 'linear'"):
        load_projector_weights(build_projector("linear", WIDTH, 40, GRID), tmp_path / "projector")


def test_every_weight_goes_on_or_is_one_of_text_and_heads(model: RepresentationModel, tmp_path: Path) -> None:
    model.save_projector(tmp_path / "projector")
    projector = build_projector(model.config, WIDTH, 40, GRID)
    load_projector_weights(projector, tmp_path / "projector")
    left = model.state_dict().keys() - projector.state_dict().keys()
    kinds = {name.split(".")[0] if not name.startswith("qformer") else name.split(".")[4] for name in left}
    assert kinds == {
        *("embeddings", "vision_projection", "text_projection", "logit_scale", "itm_head", "lm_transform"),
        *("lm_bias", "intermediate", "output"),  # the perceptrons of text
    }
    made = projector.state_dict().keys() - model.state_dict().keys()
    assert made == {"language_projection.weight", "language_projection.bias"}


def test_align_takes_it(tmp_path: Path) -> None:
    tower = tiny_tower()
    tower.save_pretrained(tmp_path / "tower")
    base = tiny_representation(tmp_path / "tokenizer")
    prepared = RepresentationModel(base.config, tower.hidden_size, tower.grid, base.tokenizer).eval()
    prepared.save_projector(tmp_path / "projector")
    config = load_config(
        AlignConfig,
        {
            "model": {
                "tower": str(tmp_path / "tower"),
                "llm": str(tiny_llm(tmp_path / "llm")),
                "projector": QFORMER,
                "projector_weights": str(tmp_path / "projector"),
            },
            "stages": [
                {
                    "name": "one",
                    "data": {"file": "absent.json"},
                    "learn": [{"match": "projector.*"}],
                    "lr": 1e-3,
                    "steps": 1,
                    "batch_size": 1,
                }
            ],
        },
    )
    vlm = build_model(config.model, config.stages[0], {}).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = vlm.vision_tower(pixels)
        expected = vlm.projector.language_projection(prepared.queries(patches))  # type: ignore[operator]
        assert torch.equal(vlm.image_tokens(patches), expected)


# --- Scores and config


def test_recall_counts_ties_as_lost_and_any_own_caption_as_found() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.5, 0.5, 0.2]])
    is_true = torch.tensor([[False, True, True], [True, False, False]])
    assert recalls(scores, is_true, "r{}") == {"r1": 0.0, "r5": 1.0, "r10": 1.0}
    assert recalls(scores[:, [1, 2, 0]], is_true[:, [1, 2, 0]], "r{}")["r1"] == 0.0
    assert recalls(scores, ~is_true, "r{}")["r1"] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 1, "epochs": 1}, "give the length of the run once"),
        ({"steps": 1, "bert": None}, "without `bert`, name the `tokenizer`"),
        ({"steps": 1, "tokenizer": "t"}, "a BERT reads its own tokens"),
        ({"steps": 1, "lr": 1e-6}, "min_lr 1e-05 is above lr 1e-06"),
        ({"steps": 1, "objective": {"itc": 0, "itm": 0, "itg": 0}}, "nothing would be learnt"),
        ({"steps": 1, "qformer": {"num_query": 2}}, "did you mean 'num_queries'"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(RepresentationConfig, {"tower": "t", "data": {"path": "d.csv"}, **changes})


@pytest.mark.parametrize("name", ["demo_qformer.yaml", "blip2_qformer.yaml"])
def test_shipped_configs_are_valid(name: str) -> None:
    config = load_config(RepresentationConfig, Path(__file__).parents[2] / "configs" / name)
    assert config.total_steps(200_000) > 1


def test_rates_of_blip2_are_those_of_lavis() -> None:
    config = load_config(RepresentationConfig, Path(__file__).parents[2] / "configs" / "blip2_qformer.yaml")
    assert (config.lr, config.min_lr, config.weight_decay, config.warmup) == (1e-4, 1e-5, 0.05, 5000)
    assert (config.objective.temperature, config.objective.label_smoothing) == (0.07, 0.1)
    assert math.isclose(config.qformer.parameter_count(1024, 2560, (16, 16)), 105e6, rel_tol=0.05)
