from __future__ import annotations

import pytest
import torch

from vlm_vision.metrics import recall_at_k, top1_accuracy


def test_top1_accuracy_counts_rows_whose_target_scores_highest() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert top1_accuracy(scores, torch.tensor([1, 0, 0, 0])) == 0.75


def test_any_of_several_captions_counts_once() -> None:
    # Two pictures, five captions: the first three are picture 0's, the last two are picture 1's.
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3], [0.9, 0.1, 0.8, 0.7, 0.6]])
    captions = [[0, 1, 2], [3, 4]]
    assert recall_at_k(scores, captions, 1) == 0.5
    assert recall_at_k(scores, captions, 2) == 0.5
    assert recall_at_k(scores, captions, 3) == 1.0
    assert recall_at_k(scores.T, [[0], [0], [0], [1], [1]], 1) == pytest.approx(2 / 5)


def test_more_than_there_is_finds_everything() -> None:
    assert recall_at_k(torch.zeros(2, 3), [[0], [2]], 10) == 1.0


def test_recall_equals_counting_by_hand() -> None:
    torch.manual_seed(0)
    scores = torch.randn(40, 60)
    positives = [torch.randperm(60)[: 1 + query % 4].tolist() for query in range(40)]
    for k in (1, 5, 10):
        hits = 0
        for row, own in zip(scores, positives, strict=True):
            best = min(int((row > row[index]).sum()) for index in own)
            hits += best < k
        assert recall_at_k(scores, positives, k) == hits / 40
