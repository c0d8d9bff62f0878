"""Training, and connectors of transformers, need today's libraries; the rest runs with LLaVA's pins too."""

from __future__ import annotations

from importlib.metadata import version

collect_ignore: list[str] = []
if int(version("transformers").partition(".")[0]) < 5:
    collect_ignore += [
        "test_open_clip_train.py",
        "test_projector_transformers.py",
        "test_representation_parity.py",
    ]
