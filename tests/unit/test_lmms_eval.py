"""Our models under lmms-eval's interface, of which a stand-in is here: it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny import COLOURS, tiny_llm, tiny_tower

from vlm_vision.adapters.build import build_projector
from vlm_vision.errors import ConfigError, DataError, MissingExtraError
from vlm_vision.train.conversations import Turn
from vlm_vision.train.vlm import VisionLanguageModel, load_llm, load_tokenizer

MODULE = "vlm_vision.train.lmms_eval"


class Lmms:
    """The parts of `lmms_eval.api.model.lmms` that a model is run by."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Lmms  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    import importlib

    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lmms")
    tower, llm = tiny_tower(), tiny_llm(folder / "llm")
    projector = build_projector("mlp2x_gelu", tower.hidden_size, 32, tower.grid)
    VisionLanguageModel(tower, projector, load_llm(llm), load_tokenizer(llm)).save_pretrained(
        folder / "model"
    )
    return folder / "model"


def requests(count: int, **options: Any) -> list[Any]:
    def visuals(doc: Any) -> list[Any]:
        return doc["pictures"]  # type: ignore[no-any-return]

    asked = "what colour is it ?"
    return [SimpleNamespace(args=(asked, dict(options), visuals, n, "task", "test")) for n in range(count)]


def documents() -> list[dict[str, Any]]:
    pictures = [Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()]
    return [
        {"pictures": [pictures[0]]},
        {"pictures": []},
        {"pictures": pictures[:2]},
        {"pictures": [pictures[3]]},
    ]


def test_it_imports_only_where_lmms_eval_is() -> None:
    sys.modules.pop(MODULE, None)
    pytest.importorskip("accelerate")
    with pytest.raises(MissingExtraError, match="pip install lmms_eval"):
        __import__(MODULE)


def test_answers_are_the_models_in_order_whatever_the_batch(adapter: Any, model: Path) -> None:
    plain = VisionLanguageModel.from_pretrained(model)
    expected = []
    for document in documents():
        shown = document["pictures"]
        pixels = plain.vision_tower.image_processor(shown) if shown else None
        expected += plain.answer(
            pixels, [[Turn("user", "<image>\n" * len(shown) + "what colour is it ?")]], 6
        )
    for batch_size in ("1", "3"):
        lm = adapter.VlmVision(str(model), batch_size=batch_size, device="cpu")
        lm.task_dict = {"task": {"test": documents()}}
        mixed = requests(4, max_new_tokens=6, temperature=0, do_sample=False)
        assert lm.generate_until(mixed) == expected
    assert (lm._rank, lm._world_size) == (0, 1)


def test_options_of_tasks(adapter: Any, model: Path) -> None:
    lm = adapter.VlmVision(str(model), device="cpu")
    lm.task_dict = {"task": {"test": documents()}}
    whole = lm.generate_until(requests(1, max_new_tokens=6))[0]
    word = whole.split()[1]
    assert (
        lm.generate_until(requests(1, max_new_tokens=6, until=[word]))[0] == whole.partition(word)[0].strip()
    )
    assert adapter._sampling({"temperature": 0, "do_sample": True}) == {"num_beams": 1}
    assert adapter._sampling({"temperature": 0.5, "do_sample": True}) == {
        "temperature": 0.5,
        "do_sample": True,
    }
    lm.task_dict["task"]["test"][0]["pictures"] = ["clip.mp4"]
    with pytest.raises(DataError, match="task 'task' shows a str; this model sees pictures alone"):
        lm.generate_until(requests(1))
    with pytest.raises(ConfigError, match="takes no 'pretraned'; did you mean 'pretrained'"):
        adapter.VlmVision(str(model), pretraned="x")
    with pytest.raises(ConfigError, match="not those of likelihoods"):
        lm.loglikelihood([])


def test_the_manifest_names_the_class(monkeypatch: pytest.MonkeyPatch, adapter: Any) -> None:
    for name in ("lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.models.registry_v2"].ModelManifest = SimpleNamespace  # type: ignore[attr-defined]
    from vlm_vision.integrations.lmms_eval import manifest

    found = manifest()
    module, _, name = found.simple_class_path.rpartition(".")
    assert (found.model_id, module) == ("vlm_vision", MODULE)
    assert issubclass(getattr(adapter, name), Lmms)
