"""What is put onto a frozen model: projectors, Q-Former, LoRA."""
