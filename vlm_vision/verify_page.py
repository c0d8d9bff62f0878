"""The page of verified towers: tables in Markdown to which every run of `towers verify` adds its own."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from vlm_vision.errors import DataError
from vlm_vision.files import whole_file
from vlm_vision.verify import TOLERANCE, Verification, format_error

INTRODUCTION = f"""\
# Towers beside their own libraries

A tower gets random weights, its library's own model the same ones, and both one picture of noise at the
tower's native size, in float32 on a CPU. Errors are the worst difference of any feature, as a share of the
largest: *patches* of the layer that a tower gives by default, when it has freed all that lies behind;
*pooled* of the image embedding, where there is one. A tower is `equal` up to {TOLERANCE:.0e}; GELU by tanh in
place of the exact one makes 2e-4.

Rows come from `vlm-vision towers verify [NAME ...] --table FILE`, which replaces those it has anew.
"""
COLUMNS = {
    "tower": ":---",
    "size": "---:",
    "patch": "---:",
    "grid": "---:",
    "layers": "---:",
    "width": "---:",
    "layer": "---:",
    "patches": "---:",
    "pooled": "---:",
    "parameters": "---:",
    "verdict": ":---",
    "run": "---:",
}
SUMMARY = ("library", "towers", "equal", "others", "worst of patches", "worst of pooled")


@dataclass
class VerifyPage:
    """A page that is read, added to, and written as a whole.

    Attributes:
        rows: cells of the table by a tower's name, but for its run.
        run_of: how each of them came about, as `describe_run` tells.
    """

    path: Path
    rows: dict[str, list[str]] = field(default_factory=dict)
    run_of: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> VerifyPage:
        """The page at a path, or an empty one where there is none.

        Raises:
            DataError: a file that is no such page, or whose rows name runs that it does not list.
        """
        page = cls(path)
        if not path.exists():
            return page
        text = path.read_text(encoding="utf-8")
        if not text.startswith(INTRODUCTION.partition("\n")[0]):
            raise DataError(f"{path} is no page of verified towers: name another file, or take it away")
        runs = dict(re.findall(r"^(\d+)\. (.+)$", text, flags=re.MULTILINE))
        for line in text.splitlines():
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(cells) == len(COLUMNS) and cells[0].startswith("`"):
                name, run = cells[0].strip("`"), cells[-1]
                if run not in runs:
                    raise DataError(f"{path}: {name} came from run {run!r}, which is not listed under Runs")
                page.rows[name], page.run_of[name] = cells[:-1], runs[run]
        return page

    def add(self, found: Verification, run: str) -> None:
        """Add a row, or replace it."""
        self.rows[found.name], self.run_of[found.name] = _cells(found), run

    def write(self) -> None:
        """Write the page, sources and names in order; complete or as it was."""
        with whole_file(self.path) as partial:
            partial.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        runs = {run: str(number) for number, run in enumerate(sorted(set(self.run_of.values())), start=1)}
        summary, tables = [], []
        for source in sorted({name.partition(":")[0] for name in self.rows}):
            names = sorted(name for name in self.rows if name.startswith(f"{source}:"))
            summary.append(_summary(source, [self.rows[name] for name in names]))
            rows = [[*self.rows[name], runs[self.run_of[name]]] for name in names]
            tables.append(f"## {source}\n\n" + _table(COLUMNS, rows))
        head = _table(dict.fromkeys(SUMMARY, "---:") | {SUMMARY[0]: ":---"}, summary)
        listed = "\n".join(f"{number}. {run}" for run, number in runs.items())
        return "\n\n".join([INTRODUCTION.rstrip(), head, f"## Runs\n\n{listed}", *tables]) + "\n"


def describe_run(command: str) -> str:
    """A line about now: date, command, machine, libraries."""
    packages = {
        "torch": "torch",
        "open_clip": "open_clip_torch",
        "timm": "timm",
        "transformers": "transformers",
    }
    libraries = ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    machine = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    return f"{date.today().isoformat()}, `{command}`; {machine}; {libraries}"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cells(found: Verification) -> list[str]:
    facts = found.facts
    known = ["-"] * 6
    if facts is not None:
        rows, columns = facts.size
        size = str(rows) if rows == columns else f"{rows}x{columns}"
        known = [size, str(facts.patch), f"{facts.grid[0]}x{facts.grid[1]}"]
        known += [str(facts.layers), str(facts.width), str(facts.layer)]
    errors = [format_error(found.patches), format_error(found.pooled)]
    parameters = "-" if facts is None else f"{facts.parameters / 1e6:,.1f} M"
    return [f"`{found.name}`", *known, *errors, parameters, found.verdict.replace("|", r"\|")]


def _summary(source: str, rows: list[list[str]]) -> list[str]:
    equal = sum(row[-1] == "equal" for row in rows)
    worst = []
    for column in ("patches", "pooled"):
        place = list(COLUMNS).index(column)
        errors = [row[place] for row in rows if row[place] != "-"]
        worst.append(max(errors, key=float, default="-"))
    return [source, str(len(rows)), str(equal), str(len(rows) - equal), *worst]


def _table(columns: dict[str, str], rows: Iterable[list[str]]) -> str:
    lines = [list(columns), list(columns.values()), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
