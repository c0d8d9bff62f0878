"""One rank of the validation checks; each writes its scores, or the error it met, into a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from tiny import tiny_dual_encoder

from vlm_vision.config import load_config
from vlm_vision.errors import DataError
from vlm_vision.train.validation import evaluate
from vlm_vision.train.validation_config import ValidationConfig


def main(config: str, output: Path) -> None:
    dist.init_process_group("gloo")
    model = tiny_dual_encoder()
    try:
        found = evaluate(
            model, load_config(ValidationConfig, json.loads(config)), group=dist.group.WORLD
        ).scores
    except DataError as error:
        found = {"error": str(error)}
    (output / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
