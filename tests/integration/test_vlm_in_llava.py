"""Our models in LLaVA's own code, and its models in ours. It needs a checkout:

VLM_VISION_LLAVA=/path/to/LLaVA python -m pytest tests/integration/test_vlm_in_llava.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("VLM_VISION_LLAVA")
WORKER = Path(__file__).with_name("vlm_in_llava_worker.py")
TOLERANCE = 1e-5  # of logits around 0.4; worst measured: 1.8e-7


@pytest.mark.skipif(CHECKOUT is None, reason="set VLM_VISION_LLAVA to a checkout of LLaVA")
def test_llava_loads_what_we_export_and_we_load_what_it_saves(tmp_path: Path) -> None:
    pytest.importorskip("transformers.core_model_loading", reason="exporting needs transformers 5")
    path = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for pictures, found in json.loads(done.stdout.splitlines()[-1]).items():
        print(pictures, found)
        assert found["report"] == []
        assert found["pixels"] <= 1e-6  # measured 2.4e-7
        assert found["exported"] <= TOLERANCE
        assert found["saved"] <= TOLERANCE
        assert found["ours"] == found["theirs"]
