"""Embeddings of texts, and the cache: by content, complete or absent, bounded, shared."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import tiny_dual_encoder
from torch import Tensor

from vlm_vision.dual_encoder import DualEncoder
from vlm_vision.errors import ConfigError
from vlm_vision.text_embeddings import TextCache, embed_classes, embed_texts

TEXTS = ["a red picture", "two dogs", "a red picture", "x"]


@pytest.fixture
def model() -> DualEncoder:
    return tiny_dual_encoder().eval()


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(tmp_path / "cache")


def files(cache: TextCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each run of the text tower took."""
    made: list[int] = []
    encode = DualEncoder.encode_text

    def counted(self: DualEncoder, tokens: Tensor) -> Tensor:
        made.append(len(tokens))
        return encode(self, tokens)

    monkeypatch.setattr(DualEncoder, "encode_text", counted)
    return made


@torch.no_grad()
def test_texts_are_the_models_and_repeats_are_embedded_once(model: DualEncoder, calls: list[int]) -> None:
    found = embed_texts(model, TEXTS)
    assert calls == [3]
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found, model.encode_text(model.tokenizer(TEXTS)), rtol=0, atol=1e-6)


def test_a_second_time_nothing_is_computed(model: DualEncoder, cache: TextCache, calls: list[int]) -> None:
    for function, arguments in ((embed_texts, (TEXTS,)), (embed_classes, (["cat", "dog"], ["a {}", "{}"]))):
        first = function(model, *arguments, cache=cache)  # type: ignore[operator]
        done = len(calls)
        again = function(tiny_dual_encoder().eval(), *arguments, cache=cache)  # type: ignore[operator]
        assert torch.equal(again, first)
        assert torch.equal(function(model, *arguments), first)  # type: ignore[operator]
        assert len(calls) == done + 1  # that without the cache
    assert len(files(cache)) == 2


def test_what_it_was_computed_from_tells_it_apart(model: DualEncoder, cache: TextCache) -> None:
    embed_classes(model, ["cat"], ["a {}", "{}"], cache=cache)
    embed_texts(model, ["a cat", "cat"], cache=cache)  # the same prompts, not averaged
    embed_classes(model, ["cat"], ["{}", "a {}"], cache=cache)
    assert len(files(cache)) == 3
    with torch.no_grad():
        next(model.tower.parameters()).add_(1)  # texts do not pass through it
    embed_texts(model, ["a cat", "cat"], cache=cache)
    assert len(files(cache)) == 3
    with torch.no_grad():
        next(model.text.parameters()).view(-1)[0] += 1e-3
    changed = embed_texts(model, ["a cat", "cat"], cache=cache)
    assert len(files(cache)) == 4
    assert torch.equal(changed, embed_texts(model, ["a cat", "cat"]))


def test_a_damaged_file_is_computed_again(model: DualEncoder, cache: TextCache, calls: list[int]) -> None:
    first = embed_texts(model, TEXTS, cache=cache)
    (path,) = files(cache)
    for damaged in (b"", path.read_bytes()[:-5]):
        path.write_bytes(damaged)
        assert torch.equal(embed_texts(model, TEXTS, cache=cache), first)
    assert len(calls) == 3
    embed_texts(model, TEXTS, cache=cache)
    assert len(calls) == 3


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    one = torch.ones(100, 10)
    TextCache(tmp_path).write("size", one)
    size = (tmp_path / "size.safetensors").stat().st_size
    os.utime(tmp_path / "size.safetensors", (1e9 - 1, 1e9 - 1))
    cache = TextCache(tmp_path, max_bytes=3 * size)
    for number, key in enumerate("abc"):
        cache.write(key, one * number)
        os.utime(tmp_path / f"{key}.safetensors", (1e9 + number, 1e9 + number))
    assert [path.stem for path in files(cache)] == ["a", "b", "c"]  # `size` went
    assert torch.equal(cache.read("a"), one * 0)
    cache.write("d", one)
    assert [path.stem for path in files(cache)] == ["a", "c", "d"]
    assert cache.read("b") is None
    left = tmp_path / ".e.safetensors.x.partial"
    left.touch()
    cache.prune()
    assert left.exists()  # another process may be writing it
    os.utime(left, (1e9, 1e9))
    cache.prune()
    assert not left.exists()


def test_several_writers_leave_whole_files(tmp_path: Path) -> None:
    tensors = {str(number % 5): torch.full((50, 50), float(number % 5)) for number in range(5)}
    size = 5 * 50 * 50 * 4 // 2  # so that they remove each other's files

    def work(number: int) -> bool:
        cache, key = TextCache(tmp_path, max_bytes=size), str(number % 5)
        cache.write(key, tensors[key])
        found = cache.read(key)
        return found is None or torch.equal(found, tensors[key])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_file_that_another_process_removes_while_it_is_read_was_read(
    cache: TextCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = torch.rand(3, 4)
    cache.write("a", embeddings)
    path, read = cache.folder / "a.safetensors", Path.read_bytes

    def read_and_removed(self: Path) -> bytes:
        content = read(self)
        self.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_removed)
    assert torch.equal(cache.read("a"), embeddings)
    assert not path.exists()


def test_the_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_VISION_CACHE", str(tmp_path / "mine"))
    assert TextCache.of_user().folder == tmp_path / "mine"  # type: ignore[union-attr]
    monkeypatch.setenv("VLM_VISION_CACHE", "off")
    assert TextCache.of_user() is None
    monkeypatch.delenv("VLM_VISION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert TextCache.of_user().folder == tmp_path / "home" / "vlm_vision" / "texts"  # type: ignore[union-attr]
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLM_VISION_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(ConfigError, match=r"cannot be written .*set VLM_VISION_CACHE"):
        TextCache.of_user()


def test_a_full_disk_is_told_and_stops_nothing(
    cache: TextCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_vision.text_embeddings.save_file", full)
    cache.write("a", torch.ones(1, 1))
    assert "are not kept in" in capsys.readouterr().err
    assert files(cache) == []
