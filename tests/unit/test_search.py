from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_vision import DualEncoder, VisualIndex, load_dual_encoder
from vlm_vision.errors import ConfigError, DataError, MissingExtraError, WeightsError

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def model_of(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return load_dual_encoder(
        {"backbone": {"name": "open_clip", "architecture": ARCHITECTURE, "weights": "none"}}
    )


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return model_of()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of noise, one of them in a subfolder, beside a file that is none."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for number in range(9):
        name = f"more/{number}.PNG" if number == 4 else f"{number}.jpg"
        noise = random.integers(0, 256, (24, 20 + number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture", encoding="utf-8")
    return tmp_path / "pictures"


def test_a_picture_finds_itself_and_a_text_what_is_nearest(model: DualEncoder, folder: Path) -> None:
    index = VisualIndex.build(model, folder, batch_size=4)
    assert len(index) == 9
    assert index.bad == []
    for path in (folder / "3.jpg", folder / "more" / "4.PNG"):
        hits = index.search(path, top_k=3)
        assert len(hits) == 3
        assert hits[0].path == str(path)
        assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert index.search(Image.open(folder / "3.jpg"), top_k=1)[0].path == str(folder / "3.jpg")
    with torch.no_grad():
        similarity = model.encode_text(model.tokenizer("a red square")) @ index.embeddings.T
    order = similarity[0].argsort(descending=True).tolist()
    assert [hit.path for hit in index.search("a red square", top_k=20)] == [
        index.paths[number] for number in order
    ]


@pytest.mark.parametrize(
    ("count", "top_k", "chunk"), [(1000, 10, 64), (1000, 1, 1000), (50, 100, 7), (3, 3, 1)]
)
def test_results_equal_faiss(model: DualEncoder, count: int, top_k: int, chunk: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    embeddings = torch.nn.functional.normalize(torch.randn(count, 16), dim=-1)
    queries = torch.nn.functional.normalize(torch.randn(20, 16), dim=-1)
    index = VisualIndex(model, [str(number) for number in range(count)], embeddings)
    scores, indices = index.nearest(queries, top_k, chunk=chunk)
    index.export_faiss(tmp_path / "index.faiss")
    flat = faiss.read_index(str(tmp_path / "index.faiss"))
    assert type(flat) is faiss.IndexFlatIP
    their_scores, their_indices = flat.search(queries.numpy(), min(top_k, count))
    assert np.array_equal(indices.numpy(), their_indices)
    assert np.abs(scores.numpy() - their_scores).max() <= 1e-6  # measured 1.2e-7


def test_an_index_survives_its_folder(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    index = VisualIndex.build(model, folder)
    index.save(tmp_path / "index")
    again = VisualIndex.load(tmp_path / "index", model)
    assert again.search("a dog") == index.search("a dog")
    assert {path.suffix for path in (tmp_path / "index").iterdir()} == {".json", ".jsonl", ".safetensors"}
    index.save(tmp_path / "index")
    assert len(VisualIndex.load(tmp_path / "index", model)) == 9


def test_another_model_is_refused(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    VisualIndex.build(model, folder).save(tmp_path / "index")
    with pytest.raises(ConfigError, match="was made by another model"):
        VisualIndex.load(tmp_path / "index", model_of(seed=1))


def test_unreadable_pictures_are_listed_up_to_a_share(
    model: DualEncoder, folder: Path, tmp_path: Path
) -> None:
    (folder / "0.jpg").write_bytes(b"<html>")
    with pytest.raises(
        DataError, match=r"1 of 9 pictures cannot be read, more than max_bad_share 0.05; .*0.jpg"
    ):
        VisualIndex.build(model, folder)
    index = VisualIndex.build(model, folder, max_bad_share=0.2, batch_size=1)
    assert len(index) == 8
    assert len(index.bad) == 1
    assert "0.jpg" in index.bad[0]
    assert index.search(folder / "1.jpg")[0].path == str(folder / "1.jpg")
    index.save(tmp_path / "index")
    assert VisualIndex.load(tmp_path / "index", model).bad == index.bad


def test_nothing_to_index_or_to_look_for_is_an_error(
    model: DualEncoder, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="does not exist"):
        VisualIndex.build(model, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no picture in it"):
        VisualIndex.build(model, tmp_path / "empty")
    with pytest.raises(DataError, match="no picture was given"):
        VisualIndex.build(model, [])
    index = VisualIndex.build(model, [folder / "1.jpg", str(folder / "2.jpg")])
    with pytest.raises(DataError, match="the query is empty"):
        index.search("  ")
    with pytest.raises(DataError, match=r"absent.png"):
        index.search(tmp_path / "absent.png")


def test_a_damaged_index_says_so(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no visual index"):
        VisualIndex.load(tmp_path, model)
    VisualIndex.build(model, folder).save(tmp_path / "index")
    (tmp_path / "index" / "embeddings.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        VisualIndex.load(tmp_path / "index", model)
    (tmp_path / "index" / "index.json").write_text(json.dumps([1]), encoding="utf-8")
    with pytest.raises(ConfigError, match="is no visual index"):
        VisualIndex.load(tmp_path / "index", model)


def test_faiss_is_named_where_it_is_missing(
    model: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'vlm_vision\[search\]'"):
        VisualIndex(model, ["a"], torch.ones(1, 16)).export_faiss(tmp_path / "index.faiss")
