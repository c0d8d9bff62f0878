"""The facts of every tower, without building one: picture size, patches, width, layers, licence.

Building all takes the better part of an hour, so the facts lie in `catalogue.csv`, and
`python -m vlm_vision.catalogue` makes that file anew with the libraries that are installed.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from vlm_vision.errors import first_line
from vlm_vision.files import whole_file
from vlm_vision.progress import progress_bar
from vlm_vision.tower_config import BACKBONES, list_source

CATALOGUE = "catalogue.csv"
UNKNOWN = "-"
# Sources whose models other packages name. Where a package has the version that the catalogue was made with,
# the names are the catalogue's, as importing it takes seconds.
PACKAGES = {"open_clip": "open_clip_torch", "timm": "timm"}

# Of the weights in hub repositories, as their model cards say; for those of timm's with a pretrained config,
# timm says it. Weights of open_clip's own training are MIT (github.com/mlfoundations/open_clip/issues/177).
# OpenAI says nothing of its weights (github.com/openai/CLIP/issues/203), so they have no line here.
LICENCES = (
    ("apple/*", "apple-amlr"),
    ("facebook/dinov2-*", "apache-2.0"),
    ("facebook/dinov3-*", "dinov3-license"),
    ("facebook/vit-mae-*", "apache-2.0"),
    ("google/siglip*", "apache-2.0"),
    ("jienengchen/ViTamin-*", "mit"),
    ("laion/*", "mit"),
    ("timm/*.laion*", "mit"),
    ("timm/eva*", "mit"),
    ("timm/MobileCLIP2-*", "apple-amlr"),
    ("timm/PE-Core-*", "apache-2.0"),
    ("timm/ViT-*-SigLIP*", "apache-2.0"),
    ("UCSC-VLAA/ViT-*-CLIPA-*", "apache-2.0"),
    ("visheratin/nllb-*", "cc-by-nc-4.0"),
)


class TowerFacts(NamedTuple):
    """A row of the catalogue; what is not known is `-`.

    Attributes:
        tower: `source:model`, as `load_tower` takes it; a source that names no models stands alone.
        size: side of its pictures in pixels, or rows x columns.
        patch: pixels between patches.
        grid: rows x columns of patches, after the layer that is given by default.
        width: channels of a feature, of that layer.
        layers: blocks or stages of the whole backbone; -2 of blocks, -1 of stages is given by default.
        licence: of the published weights, in the order of their tags; several where tags differ, `?` among
            them where that of a tag is not known.
    """

    tower: str
    size: str = UNKNOWN
    patch: str = UNKNOWN
    grid: str = UNKNOWN
    width: str = UNKNOWN
    layers: str = UNKNOWN
    licence: str = UNKNOWN


def list_towers(source: str | None = None, match: str = "*") -> list[TowerFacts]:
    """Every tower that can be named, with its facts where the catalogue has them.

    Args:
        source: only this one.
        match: a glob, of the model's name.
    """
    made_with, known = _read()
    listed = []
    for name in BACKBONES.names() if source is None else [source]:
        if name in PACKAGES and made_with.get(name) == version(PACKAGES[name]):
            towers = [tower for tower in known if tower.startswith(f"{name}:")]
        else:
            towers = list_source(name)
        listed += [tower for tower in towers if fnmatchcase(tower.partition(":")[2], match)]
    return [known.get(tower, TowerFacts(tower)) for tower in listed]


@cache
def _read() -> tuple[dict[str, str], dict[str, TowerFacts]]:
    """Versions of the packages by their source, and rows by their tower."""
    first, _, *rows = files("vlm_vision").joinpath(CATALOGUE).read_text(encoding="utf-8").splitlines()
    made_with = dict(part.split() for part in first.removeprefix("#").split(","))
    return made_with, {row[0]: TowerFacts(*row) for row in csv.reader(rows)}


def describe(tower: str) -> TowerFacts:
    """The facts of a tower, found by building it without memory.

    Raises:
        ConfigError: it cannot be built. Libraries raise errors of their own too.
    """
    from vlm_vision.tower import describe_tower

    built = describe_tower(tower)
    size, (rows, columns) = built.image_size, built.grid
    return TowerFacts(
        tower,
        size=str(size) if isinstance(size, int) else "x".join(map(str, size)),
        patch=str(built.patch_size),
        grid=f"{rows}x{columns}",
        width=str(built.hidden_size),
        layers=str(built.backbone.info.num_layers),
        licence=licence(tower),
    )


def licence(tower: str) -> str:
    """Licences of the weights that a tower's library names, as `TowerFacts.licence` tells them."""
    source, _, model = tower.partition(":")
    if source == "timm":
        found = [config.license for config in _timm_configs(model).values() if config.has_weights]
    elif source == "open_clip":
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(model)
        found = [_licence_of(open_clip.get_pretrained_cfg(model, tag)["hf_hub"]) for tag in tags]
    else:
        found = [_licence_of(model)]
    named = list(dict.fromkeys("?" if one in (None, "unknown") else str(one) for one in found))
    return UNKNOWN if named in ([], ["?"]) else ",".join(named)


def _licence_of(repository: str) -> str | None:
    owner, _, name = repository.rstrip("/").partition("/")
    recorded = _timm_configs(name.split(".")[0]) if owner == "timm" else {}
    if name in recorded:
        said: str | None = recorded[name].license
        return said
    return next((licence for glob, licence in LICENCES if fnmatchcase(repository, glob)), None)


def _timm_configs(model: str) -> dict[str, Any]:
    """timm's records of pretrained weights by `MODEL.TAG`, the default tag first."""
    import timm

    found: dict[str, Any] = timm.models.get_arch_pretrained_cfgs(model) if timm.is_model(model) else {}
    return found


def _try_to_describe(tower: str) -> tuple[TowerFacts, str]:
    try:
        return describe(tower), ""
    except Exception as error:  # whatever a library raises is a finding about this one model
        return TowerFacts(tower, licence=licence(tower)), first_line(error)


def make(path: Path) -> None:
    """Write the catalogue of all towers of the installed packages, with a process for each core."""
    towers = [tower for source in (*PACKAGES, "transformers") for tower in list_source(source)]
    made_with = ", ".join(f"{source} {version(package)}" for source, package in PACKAGES.items())
    with (
        whole_file(path) as partial,
        partial.open("w", encoding="utf-8", newline="") as file,
        multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=100) as pool,
        progress_bar(len(towers), "towers") as bar,
    ):
        file.write(f"# {made_with}\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(TowerFacts._fields)
        for facts, reason in pool.imap(_try_to_describe, towers):
            rows.writerow(facts)
            if reason:
                bar.write(f"{facts.tower}: {reason}")
            bar.update()


if __name__ == "__main__":
    make(Path(__file__).with_name(CATALOGUE))
