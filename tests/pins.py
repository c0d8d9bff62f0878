"""What the libraries that LLaVA pins do not have; `make test-pinned` leaves the tests of it out."""

from __future__ import annotations

import pytest
import torch
import transformers

OLD_TRANSFORMERS = not hasattr(transformers, "CLIPImageProcessorPil")
OLD_TORCH = not hasattr(torch.compiler, "is_compiling")
needs_new_torch = pytest.mark.skipif(OLD_TORCH, reason="this torch does not trace these models whole")


def knows(model_type: str) -> bool:
    """Whether this transformers has the model."""
    return model_type in transformers.CONFIG_MAPPING
