"""One rank of an extraction, which a test may kill in the middle.

    extract_worker.py FOLDER OUTPUT DIE

The tower and the pictures are `FOLDER/tower` and `FOLDER/pictures`. No rank claims a shard before all are
ready, so that each has its share. With DIE, rank 1 is killed without warning in its DIE-th batch, and the
launcher then ends the other, wherever that is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_vision import load_tower
from vlm_vision.extract import _Ranks, extract_features

BATCH_SIZE, SHARD_SIZE = 2, 6


def main(folder: Path, output: Path, die: int) -> None:
    rank = int(os.environ["RANK"])
    tower = load_tower(folder / "tower")
    forward, batches = tower.backbone.forward_layers, 0

    def count_and_die(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if rank == 1 and batches == die:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0 and die:
            time.sleep(0.2)  # else it could do the work of both before the other gets there
        return forward(*arguments)

    tower.backbone.forward_layers = count_and_die  # type: ignore[method-assign]
    claim = _Ranks.claim

    def claim_together(self: _Ranks, shards: Sequence[int]) -> Iterator[int]:
        """None takes a second shard before all have their first, however late one starts."""
        for place, shard in enumerate(claim(self, shards)):
            if place == 0:
                self.add("begun")
            while self.add("begun", 0) < self.world:
                time.sleep(0.05)
            yield shard

    _Ranks.claim = claim_together  # type: ignore[method-assign]
    extract_features(
        tower, [folder / "pictures"], output, batch_size=BATCH_SIZE, shard_size=SHARD_SIZE, workers=1
    )
    (folder / f"{output.name}.rank{rank}").write_text(str(batches))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
