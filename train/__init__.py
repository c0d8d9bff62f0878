"""Losses, data, the contrastive loop, the alignment stages, evaluation."""
