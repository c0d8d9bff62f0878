"""A backbone for `vlm_vision`."""
