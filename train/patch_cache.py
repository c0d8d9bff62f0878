"""Features of a frozen tower for an alignment stage, kept on disk by what they were computed from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch.distributed as dist

from vlm_vision.errors import ConfigError
from vlm_vision.extract import Extraction, extract_features
from vlm_vision.feature_shards import INDEX_FILE, FeatureShards
from vlm_vision.picture_list import ListedPicture
from vlm_vision.progress import progress_bar
from vlm_vision.tower import VisionTower
from vlm_vision.train.align_config import Stage
from vlm_vision.train.conversations import Conversations, MixedConversations
from vlm_vision.weights import fingerprint

_SAMPLE = 64  # pictures that the speed of reading back is measured on


def kept_features(
    tower: VisionTower, conversations: Conversations | MixedConversations, stage: Stage, steps: int
) -> FeatureShards | None:
    """Features of all pictures of a stage, computed where they are not there yet; every rank must ask.

    They lie in the stage's `feature_cache`, in a folder named by a hash of the tower's weights, precision,
    layers and preprocessing, and of the pictures' names and bytes: what is there is never out of date.

    Returns:
        None where the stage reads no picture twice and nothing is there yet: keeping them would not pay.

    Raises:
        ConfigError: the tower learns, so that its features change.
        DataError: pictures without files of their own, a disk that is too small, or damaged features.
    """
    assert stage.sources[0].feature_cache is not None
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ConfigError(
            f"stage {stage.name!r}: feature_cache keeps the features of a frozen tower, and this one learns; "
            "leave feature_cache out, or vision_tower.* out of `learn`"
        )
    is_main = dist.get_rank() == 0
    readings = conversations.readings() if is_main else Counter[ListedPicture]()
    share = steps * stage.batch_size / conversations.epoch_size  # of an epoch
    times = share * readings.total() / len(readings) if readings else 0.0
    found: list[Path | None] = [None]
    if is_main and readings:
        folder = Path(stage.sources[0].feature_cache) / _content_key(tower, list(readings))
        if times > 1 or (folder / INDEX_FILE).is_file():
            found = [folder]
        else:
            print(f"stage {stage.name!r} reads a picture {times:.1f} times: features are not kept")
    dist.broadcast_object_list(found)
    if found[0] is None:
        return None
    tower.eval()
    made = extract_features(
        tower, list(readings), found[0], max_bad_share=1.0, workers=stage.sources[0].workers or None
    )
    dist.barrier()
    features = FeatureShards(found[0])
    if made is not None:
        _tell(features, made, times, stage.name)
    return features


def _content_key(tower: VisionTower, pictures: Sequence[ListedPicture]) -> str:
    digest = sha256(fingerprint(tower, repr((tower.config, tower.image_processor.config))).encode())
    with progress_bar(len(pictures), "hash pictures") as bar:
        for picture in pictures:
            content = sha256(Path(picture.file).read_bytes()).hexdigest()
            digest.update(f"{picture.name}\0{content}\0".encode())
            bar.update()
    return digest.hexdigest()[:32]


def _tell(features: FeatureShards, made: Extraction, times: float, stage: str) -> None:
    """Print what is kept, and from how many readings of a picture on that pays."""
    size = sum(file.stat().st_size for file in features.folder.iterdir()) / 1e9
    line = (
        f"stage {stage!r} reads a picture {times:.1f} times; features of {made.pictures:,} ({size:,.2f} GB)"
    )
    if not made.new:
        print(f"{line} are in {features.folder}")
        return
    names = list(features)[:: max(1, len(features) // _SAMPLE)]
    began = time.perf_counter()
    for name in names:
        features[name].sum()
    reading = (time.perf_counter() - began) / len(names)
    making = made.seconds / made.new
    pays = f"pays from {1 / (1 - reading / making):.2f} readings on" if reading < making else "never pays"
    line += f" made in {made.seconds:.0f} s"
    print(f"{line}: {1e3 * making:.1f} ms each to make, {1e3 * reading:.2f} to read: {pays}")
