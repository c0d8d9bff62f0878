"""PEFT's folders and contrastive checkpoints on top of base weights: merged exactly, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import TOWER, captioned_pictures, tiny_dual_encoder, tiny_tower
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from vlm_vision import VisionTower, load_dual_encoder, load_tower
from vlm_vision.adapters import load_adapter
from vlm_vision.adapters.lora import merge_lora
from vlm_vision.architectures import transformers_config
from vlm_vision.config import load_config
from vlm_vision.errors import ConfigError, WeightsError
from vlm_vision.export import export_clip, library_state
from vlm_vision.layouts import convert
from vlm_vision.train import contrastive
from vlm_vision.train.contrastive_config import ContrastiveConfig
from vlm_vision.train.learner import Learner

ARCHITECTURE: Any = TOWER["backbone"]["architecture"]
LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# Of the largest feature; the two sum in another order.
TOLERANCE = 2e-6  # 4.6e-7


def pixels() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def whole_tower() -> VisionTower:
    """The tower of the tiny dual encoder, with all its layers."""
    return tiny_dual_encoder().tower


def clip_model() -> CLIPModel:
    """transformers' model of the tiny dual encoder's weights."""
    model = CLIPModel(CLIPConfig(**transformers_config(ARCHITECTURE))).eval()
    model.load_state_dict(convert(library_state(tiny_dual_encoder()), "transformers"))
    return model


def vision_model() -> CLIPVisionModel:
    model = CLIPVisionModel(CLIPVisionConfig(**transformers_config(ARCHITECTURE)["vision_config"])).eval()
    inner = getattr(model, "vision_model", model)  # transformers 5 dropped the inner level
    inner.load_state_dict(clip_model().vision_model.state_dict())
    return model


def adapted(model: nn.Module, folder: Path, **config: Any) -> Any:
    """A peft model with adapters that are not at zero, saved in `folder`."""
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": LINEAR, **config}
    wrapped = get_peft_model(model, LoraConfig(**settings))  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name or "modules_to_save" in name or parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder))
    return wrapped.eval()


def assert_close(found: Tensor, expected: Tensor, base: Tensor) -> None:
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= TOLERANCE * largest
    assert float((base - expected).abs().max()) > 1e-2 * largest  # the adapter does something


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["q_proj", "patch_embedding"]},
        {"rank_pattern": {"fc1": 4}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 7}},
        {"target_modules": ["q_proj", "patch_embedding"]},
        {"bias": "lora_only", "modules_to_save": ["pre_layrnorm"]},
    ],
    ids=[
        "linear",
        "rslora",
        "dora",
        "dora on a convolution",
        "patterns",
        "convolution",
        "biases and whole modules",
    ],
)
def test_an_adapter_of_transformers_vision_model_gives_pefts_features(
    config: dict[str, Any], tmp_path: Path
) -> None:
    peft_model = adapted(vision_model(), tmp_path, **config)
    tower = whole_tower()
    base = tower(pixels())
    load_adapter(tower, tmp_path)
    unmerged = peft_model(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(tower(pixels()), unmerged, base)
    merged = peft_model.merge_and_unload()(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(tower(pixels()), merged, base)


@torch.no_grad()
def test_an_adapter_of_a_whole_clip_goes_onto_both_towers_or_the_vision_tower(tmp_path: Path) -> None:
    peft_model = adapted(
        clip_model(), tmp_path, target_modules=[*LINEAR, "visual_projection", "text_projection"]
    )
    tokens = tiny_dual_encoder().tokenizer(["a red square", "two cats"])
    output = peft_model(input_ids=tokens, pixel_values=pixels())
    model, before = tiny_dual_encoder(), tiny_dual_encoder()
    done = load_adapter(model, tmp_path)
    assert not done.left_out
    assert not done.replaced
    assert_close(model.encode_image(pixels()), output.image_embeds, before.encode_image(pixels()))
    assert_close(model.encode_text(tokens), output.text_embeds, before.encode_text(tokens))
    tower = whole_tower()
    done = load_adapter(tower, tmp_path)
    assert torch.equal(tower(pixels()), model.tower(pixels()))
    assert len(done.left_out) == 2 * 6 + 1
    assert all(name.startswith("text_") for name in done.left_out)


@torch.no_grad()
def test_an_adapter_of_open_clips_own_model_with_its_fused_attention(tmp_path: Path) -> None:
    import open_clip

    native = open_clip.CLIP(**ARCHITECTURE).eval()
    native.load_state_dict(convert(library_state(tiny_dual_encoder()), "open_clip_flat"))
    peft_model = adapted(native, tmp_path, target_modules=["attn", "c_fc", "c_proj", "token_embedding"])
    model, before = tiny_dual_encoder(), tiny_dual_encoder()
    load_adapter(model, tmp_path)
    tokens = model.tokenizer(["a red square", "two cats"])
    image = peft_model.encode_image(pixels())
    assert_close(model.tower.pooled(pixels()), image, before.tower.pooled(pixels()))
    merged = peft_model.merge_and_unload()
    assert_close(model.tower.pooled(pixels()), merged.encode_image(pixels()), before.tower.pooled(pixels()))
    assert_close(model.text(tokens), merged.encode_text(tokens), before.text(tokens))
    path = tmp_path / "adapter_config.json"
    newer = {**json.loads(path.read_text(encoding="utf-8")), "peft_version": "0.22.0"}
    path.write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trained with peft 0.22.0 .* adds twice through 0.21"):
        load_adapter(tiny_dual_encoder(), tmp_path)


@torch.no_grad()
def test_an_adapter_onto_a_transformers_tower_and_into_an_export(tmp_path: Path) -> None:
    export_clip(whole_tower(), tmp_path / "base")
    peft_model = adapted(vision_model(), tmp_path / "lora")
    tower = load_tower(f"transformers:{tmp_path / 'base'}", pooled_head=True)
    base = tower(pixels())
    load_adapter(tower, tmp_path / "lora")
    expected = peft_model(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(tower(pixels()), expected, base)
    export_clip(tower, tmp_path / "merged")
    exported = CLIPVisionModel.from_pretrained(tmp_path / "merged").eval()
    assert_close(exported(pixels(), output_hidden_states=True).hidden_states[-2][:, 1:], expected, base)


def test_what_hits_nothing_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    adapted(vision_model(), tmp_path / "lora")
    tower = tiny_tower()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}

    def refused(message: str, model: Any = tower, folder: str = "lora") -> None:
        with pytest.raises(WeightsError, match=message):
            load_adapter(model, tmp_path / folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())

    refused(
        r"6 not in this model: vision_model.encoder.layers.2.*\n.*freed all .* after layer 2.*pooled_head"
    )
    shutil.copytree(tmp_path / "lora", tmp_path / "typo")
    path = tmp_path / "typo" / "adapter_model.safetensors"
    state = load_file(path)
    save_file(
        {name.replace("layers.1.mlp.fc1", "layers.1.mlp.fc3"): value for name, value in state.items()}, path
    )
    whole = whole_tower()
    refused(r"1 not in this model: vision_model.encoder.layers.1.mlp.fc3.weight$", whole, "typo")
    save_file({name: value for name, value in state.items() if "layers.0.mlp.fc1.lora_B" not in name}, path)
    refused(r"layers.0.mlp.fc1 has only one of its two factors, A", whole, "typo")
    save_file({f"other.{name}": value for name, value in state.items()}, path)
    refused(r"none of its tensors belongs to this model.*they are other.base_model", whole, "typo")
    wide = {**ARCHITECTURE, "vision_cfg": {**ARCHITECTURE["vision_cfg"], "width": 128}}
    wider = load_tower(
        {"backbone": {"name": "open_clip", "architecture": wide, "weights": "none"}}, pooled_head=True
    )
    refused(r"18 of another shape: .*fc1.weight: \(256, 64\) onto \(512, 128\)", wider)


def test_a_base_that_no_shape_tells_from_another_is_told_by_its_name(tmp_path: Path) -> None:
    adapted(vision_model(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "base_model_name_or_path": "openai/clip-vit-base-patch16"}))
    with pytest.raises(
        WeightsError,
        match=r"\(its base: openai/clip-vit-base-patch16\): .* image_size 224, here 32; .*hidden_act",
    ):
        load_adapter(whole_tower(), tmp_path)
    path.write_text(json.dumps({**config, "base_model_name_or_path": "someone/own-clip"}))
    load_adapter(whole_tower(), tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LoRA, rsLoRA and DoRA are merged here"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"of_the_future": 3}, "of_the_future is 3"),
    ],
)
def test_other_kinds_of_adapters_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapted(vision_model(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changed}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_adapter(whole_tower(), tmp_path)


def test_folders_that_are_no_adapter_or_not_complete_are_refused(tmp_path: Path) -> None:
    tower = whole_tower()
    with pytest.raises(ConfigError, match=r"holds neither adapter_config.json.* nor learnt.safetensors"):
        load_adapter(tower, tmp_path)
    adapted(vision_model(), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no adapter_model.safetensors or adapter_model.bin"):
        load_adapter(tower, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"adapter_config.json is not JSON"):
        load_adapter(tower, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "adapter_model.safetensors")
    other = load_tower("timm:vit_tiny_patch16_224@none")
    with pytest.raises(ConfigError, match=r"backbone of 'timm' has no names in CLIP's layouts"):
        load_adapter(other, tmp_path)


# Contrastive runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "clip"
    tiny_dual_encoder().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains, and gives the checkpoint of step 2 with the whole model of that step beside it, `model_2`."""
    state = Learner.state

    def both(self: Learner) -> dict[str, Any]:
        if self.schedule.last_epoch == 2:
            merge_lora(deepcopy(self.objective.model)).save_pretrained(tmp_path / "model_2")  # type: ignore[operator]
        return state(self)

    def train(**settings: Any) -> Path:
        monkeypatch.setattr(Learner, "state", both)
        tree = {
            "model": str(base),
            "data": {"path": str(captioned_pictures(tmp_path / "data"))},
            "lora": {"rank": 2, "alpha": 6.0},
            "steps": 3,
            "save_every": 2,
            "batch_size": 8,
            "lr": 1e-2,
            "workers": 0,
            "report": False,
        }
        contrastive.train_contrastive(load_config(ContrastiveConfig, {**tree, **settings}), tmp_path / "run")
        return tmp_path / "run" / "checkpoints" / "step_2"

    return train


@pytest.mark.parametrize("recipe", ["lora", "full", "frozen_vision"])
def test_a_checkpoint_on_its_base_is_the_model_of_that_step(
    recipe: str, base: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    found = checkpoint(recipe=recipe)
    model, expected = load_dual_encoder(base), load_dual_encoder(tmp_path / "model_2")
    load_adapter(model, found)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=0, atol=1e-7), name  # 0
    assert torch.equal(model.logit_scale, expected.logit_scale)
    tower, before = VisionTower.from_pretrained(base, pooled_head=True), whole_tower()
    done = load_adapter(tower, found)
    assert "logit_scale" in done.left_out
    with torch.no_grad():
        features, base_features = expected.tower(pixels()), before(pixels())
        assert torch.equal(tower(pixels()), model.tower(pixels()))
        if recipe == "frozen_vision":
            assert torch.equal(tower(pixels()), base_features)
            assert not torch.equal(tower.pooled(pixels()), before.pooled(pixels()))
        else:
            assert_close(tower(pixels()), features, base_features)


def test_whole_thirds_of_a_split_attention_and_full_biases_find_their_place(
    base: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A rule may train the fused projection fully beside a LoRA on the output, which splits it."""
    rules = [
        {"match": "*.out_proj.weight", "learn": "lora"},
        {"match": "*.in_proj_*", "learn": "full"},
        {"match": "*.out_proj.bias", "learn": "full"},
    ]
    found = checkpoint(rules=rules)
    assert any(".in_proj.k_proj.weight" in name for name in load_file(found / "learnt.safetensors"))
    model, expected = load_dual_encoder(base), load_dual_encoder(tmp_path / "model_2")
    load_adapter(model, found)
    for name, tensor in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, rtol=0, atol=1e-7), name


def test_a_checkpoint_that_does_not_fit_is_refused(
    base: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    found = checkpoint(recipe="lora")
    with pytest.raises(
        WeightsError, match=r"not in this model: .*resblocks.2.*\n.*load the base with pooled_head"
    ):
        load_adapter(tiny_tower(), found)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("rank: 2", "rank: 3"), encoding="utf-8")
    with pytest.raises(WeightsError, match=r"has rank 2, and .*config.yaml says 3"):
        load_adapter(load_dual_encoder(base), found)
    config.unlink()
    with pytest.raises(ConfigError, match=r"config.yaml' does not exist"):
        load_adapter(load_dual_encoder(base), found)


def test_what_is_no_tower_says_what_it_is_and_what_to_name(
    base: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    def told(source: Path, load: Callable[[Path], Any] = load_tower) -> str:
        with pytest.raises(ConfigError) as caught:
            load(source)
        return str(caught.value)

    found = checkpoint(recipe="lora")
    message = told(found)
    assert "It is a checkpoint of a run, which holds what learnt and not the rest" in message
    assert message.endswith(f"vlm_vision.adapters.load_adapter(tower, '{found}')")
    run = found.parent.parent
    assert told(run).endswith(f"It is the folder of a run: name '{run / 'model'}'")
    assert isinstance(load_tower(run / "model"), VisionTower)
    adapted(vision_model(), tmp_path / "lora")
    assert "It is a PEFT adapter, which holds what learnt and not the rest" in told(tmp_path / "lora")
    vlm = tmp_path / "vlm"
    tiny_tower().save_pretrained(vlm / "tower")
    (vlm / "config.json").write_text('{"model_type": "of another"}', encoding="utf-8")
    assert told(vlm).endswith(f"It is a vision-language model: name '{vlm / 'tower'}'")
    assert told(vlm / "tower", load_dual_encoder).endswith("a tower alone has no text tower")
