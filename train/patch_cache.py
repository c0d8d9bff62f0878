"""Features of a frozen tower for an alignment stage, kept on disk by what they were computed from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image

from vlm_vision.errors import ConfigError, DataError
from vlm_vision.extract import Extraction, extract_features
from vlm_vision.feature_shards import INDEX_FILE, FeatureShards
from vlm_vision.picture_list import ListedPicture, NamedBytes
from vlm_vision.pictures import open_image, picture_size
from vlm_vision.preprocess import ImageProcessor
from vlm_vision.progress import progress_bar
from vlm_vision.tiling import cut_picture
from vlm_vision.tower import VisionTower
from vlm_vision.train.align_config import Stage
from vlm_vision.train.conversations import Conversations, MixedConversations, Record, feature_names
from vlm_vision.train.tiles import TileFormat
from vlm_vision.weights import fingerprint

_SAMPLE = 64  # pictures that the speed of reading back is measured on

Places = dict[str, tuple[int, int]]
"""By the hash of a picture's bytes, the first record that shows it, and where among its pictures."""


def kept_features(
    tower: VisionTower,
    conversations: Conversations | MixedConversations,
    tiles: TileFormat | None,
    stage: Stage,
    steps: int,
) -> FeatureShards | None:
    """Features of all pictures of a stage, computed where they are not there yet; every rank must ask.

    They lie in the stage's `feature_cache`, in a folder named by a hash of the tower's weights, precision,
    layers and preprocessing, of how pictures are cut, and of the pictures' bytes: what is there is never out
    of date. There `feature_names` tells each picture's.

    Args:
        tiles: how pictures are cut, where they are; features are then kept of each tile.

    Returns:
        None where the stage reads no picture twice and nothing is there yet: keeping them would not pay.

    Raises:
        ConfigError: the tower learns, so that its features change.
        DataError: a disk that is too small, or damaged features.
    """
    assert stage.sources[0].feature_cache is not None
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ConfigError(
            f"stage {stage.name!r}: feature_cache keeps the features of a frozen tower, and this one learns; "
            "leave feature_cache out, or vision_tower.* out of `learn`"
        )
    is_main = dist.get_rank() == 0
    readings, places = _readings(conversations, tiles) if is_main else (Counter[str](), {})
    share = steps * stage.batch_size / conversations.epoch_size  # of an epoch
    times = share * readings.total() / len(readings) if readings else 0.0
    seen = f"stage {stage.name!r} reads a {'picture' if tiles is None else 'tile'} {times:.1f} times"
    found: list[Any] = [None]
    if is_main and readings:
        folder = Path(stage.sources[0].feature_cache) / _content_key(tower, tiles, readings)
        if times > 1 or (folder / INDEX_FILE).is_file():
            found = [(folder, places)]
        else:
            print(f"{seen}: features are not kept")
    dist.broadcast_object_list(found)
    if found[0] is None:
        return None
    folder, places = found[0]  # the other ranks hash nothing, and open pictures too
    pictures = _Opener(conversations, places, tower.image_processor, tiles)
    tower.eval()
    made = extract_features(
        tower,
        [ListedPicture(name, conversations.path) for name in sorted(readings)],
        folder,
        max_bad_share=1.0,
        workers=stage.sources[0].workers or None,
        opener=pictures,
    )
    dist.barrier()
    features = FeatureShards(folder)
    if made is not None:
        print(f"{seen}; {_told(features, made, pictures)}")
    return features


def _readings(
    conversations: Conversations | MixedConversations, tiles: TileFormat | None
) -> tuple[Counter[str], Places]:
    """How often an epoch reads the features of each name, and where the pictures are."""
    readings, places = Counter[str](), Places()
    names: dict[bytes, list[str]] = {}  # by a hash of what records call the picture, which may be its bytes
    usable = [index for index in range(len(conversations)) if index not in conversations.bad]
    with progress_bar(len(usable), "hash pictures") as bar:
        for index in usable:
            record = conversations[index]
            for place, name in enumerate(record.images):
                called = sha256(name.encode(errors="surrogatepass")).digest()
                if called not in names:
                    names[called] = _names(conversations, record, place, tiles)
                    if names[called]:
                        places.setdefault(_digest(names[called][0]), (index, place))
                readings.update(names[called])
            bar.update()
    return readings, places


def _names(
    conversations: Conversations | MixedConversations, record: Record, place: int, tiles: TileFormat | None
) -> list[str]:
    """Names of a picture's features; none where it cannot be read, of which its record tells."""
    try:
        content = conversations.content(record, place)
        count = 1 if tiles is None else tiles.num_tiles(picture_size(content))
    except DataError:
        return []
    return feature_names(content, count)


def _digest(name: str) -> str:
    return name.partition(".")[0]


class _Opener:
    """Pictures of conversations as `extract_features` opens them, by the names of their features."""

    def __init__(
        self,
        conversations: Conversations | MixedConversations,
        places: Places,
        processor: ImageProcessor,
        tiles: TileFormat | None,
    ) -> None:
        self.conversations, self.places, self.processor, self.tiles = conversations, places, processor, tiles

    def __call__(self, pictures: Sequence[ListedPicture]) -> Iterator[Image.Image | DataError]:
        for digest, rows in groupby(pictures, key=lambda picture: _digest(picture.name)):
            record, place = self.find(digest)
            changed = DataError(f"{record.file}: record {record.id!r}: a picture changed while it was read")
            try:
                found = self._tiles(record, place)
            except DataError as error:
                found, changed = {}, error
            for row in rows:
                yield found.get(row.name, changed)

    def find(self, digest: str) -> tuple[Record, int]:
        """A record that shows the picture, and where."""
        index, place = self.places[digest]
        return self.conversations[index], place

    def _tiles(self, record: Record, place: int) -> dict[str, Image.Image]:
        content = self.conversations.content(record, place)
        image = open_image(NamedBytes(content, f"record {record.id!r}, picture {place}"))
        cut = [image] if self.tiles is None else cut_picture(image, self.processor, self.tiles.config)
        return dict(zip(feature_names(content, len(cut)), cut, strict=True))


def _content_key(tower: VisionTower, tiles: TileFormat | None, names: Counter[str]) -> str:
    settings: list[object] = [tower.config, tower.image_processor.config]
    if tiles is not None:
        height, width = tiles.tile_size
        settings += [tiles.config.mode, tiles.config.resolutions(width, height)]
    digest = sha256(fingerprint(tower, repr(settings)).encode())
    for name in sorted(names):
        digest.update(f"{name}\n".encode())
    return digest.hexdigest()[:32]


def _told(features: FeatureShards, made: Extraction, pictures: _Opener) -> str:
    """What is kept, and from how many readings of a picture or a tile on that pays."""
    size = sum(file.stat().st_size for file in features.folder.iterdir()) / 1e9
    of = "" if pictures.tiles is None else f"tiles of {len(set(map(_digest, features))):,} pictures "
    line = f"features of {len(features):,} {of}({size:,.2f} GB)"
    if not made.new or not features:
        return f"{line} are in {features.folder}"
    making, reading = made.seconds / made.new, _seconds_to_read(features, pictures)
    pays = f"pays from {1 / (1 - reading / making):.2f} readings on" if reading < making else "never pays"
    line += f" made in {made.seconds:.0f} s"
    return f"{line}: {1e3 * making:.1f} ms each to make, {1e3 * reading:.2f} to read: {pays}"


def _seconds_to_read(features: FeatureShards, pictures: _Opener) -> float:
    """Of a picture or a tile, as a stage finds them: by the picture's bytes, of some of them."""
    digests = list(dict.fromkeys(map(_digest, features)))
    shown = [pictures.find(digest) for digest in digests[:: max(1, len(digests) // _SAMPLE)]]
    most = 1 if pictures.tiles is None else pictures.tiles.most_tiles
    count = 0
    began = time.perf_counter()
    for record, place in shown:
        for name in feature_names(pictures.conversations.content(record, place), most):
            if name in features:
                features[name].sum()
                count += 1
    return (time.perf_counter() - began) / count
