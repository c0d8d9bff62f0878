"""What can be told of every projector by its name: source, tokens, weights."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

from vlm_vision.adapters.config import PROJECTORS, Grid, parse_projector
from vlm_vision.errors import ConfigError

UNKNOWN = "-"
COLUMNS = ("projector", "paper", "reference", "tokens", "at {grid}", "parameters {widths}")


class ProjectorFacts(NamedTuple):
    """A projector with its options as they are by default.

    Attributes:
        paper, reference, shape: where it comes from, and how many tokens come out of which patches, as the
            docstring of its config says; "-" where it does not.
        tokens: of a picture; None where its grid does not fit.
        parameters: None where grid or widths do not fit.
        remark: why not.
    """

    name: str
    paper: str
    reference: str
    shape: str
    tokens: int | None
    parameters: int | None
    remark: str


def list_facts(in_features: int, out_features: int, grid: Grid) -> list[ProjectorFacts]:
    """Every projector for patches of `in_features` channels on a grid, and tokens of `out_features`."""
    return [_facts(name, in_features, out_features, grid) for name in PROJECTORS.names()]


def facts_table(in_features: int, out_features: int, grid: Grid) -> str:
    """`list_facts` as a table in Markdown."""
    at = {"grid": f"{grid[0]}x{grid[1]}", "widths": f"{in_features} to {out_features}"}
    rows = [[column.format(**at) for column in COLUMNS], [":---"] * 4 + ["---:"] * 2]
    for facts in list_facts(in_features, out_features, grid):
        numbers = [UNKNOWN if count is None else f"{count:,}" for count in (facts.tokens, facts.parameters)]
        rows.append([f"`{facts.name}`", facts.paper, facts.reference, facts.shape, *numbers])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _facts(name: str, in_features: int, out_features: int, grid: Grid) -> ProjectorFacts:
    text = inspect.cleandoc(PROJECTORS.config_class(name).__doc__ or "")
    told = [_field(text, field) for field in ("Paper", "Reference", "Shape")]
    tokens = parameters = None
    try:
        config = parse_projector(name)
        tokens = config.tokens_out(grid)
        config.check(in_features, out_features, grid)
        parameters = config.parameter_count(in_features, out_features, grid)
    except ConfigError as error:
        return ProjectorFacts(name, *told, tokens, parameters, str(error))
    return ProjectorFacts(name, *told, tokens, parameters, "")


def _field(docstring: str, field: str) -> str:
    """What stands behind `Paper:` and the like, over lines that are indented."""
    found = re.search(rf"^{field}: (.+(?:\n +.+)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()).removesuffix(".") if found else UNKNOWN
