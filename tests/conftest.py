"""Every test alike: one thread per process, no network, caches in a folder of their own."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

# Before anything imports torch or datasets, which read these once; processes that tests start inherit them.
CACHE = tempfile.mkdtemp(prefix="vlm_vision_tests_")
os.environ["HF_HOME"] = CACHE
os.environ["HF_DATASETS_CACHE"] = f"{CACHE}/datasets"
os.environ["VLM_VISION_CACHE"] = f"{CACHE}/texts"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLM_VISION_CACHE"] = f"{CACHE}/vlm_vision"
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
