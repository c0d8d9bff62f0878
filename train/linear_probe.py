"""A linear classifier on frozen features: what they hold that a class can be read from."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vlm_vision.errors import DataError, require
from vlm_vision.metrics import Classification, classification_of_scores

MAX_ITERATIONS = 1000
HELD_OUT = 0.2  # of the pictures to fit on, those that choose C
COARSE = range(-6, 7, 2)  # decades of C, as CLIP searched them
FINEST = 1 / 8  # of a decade


def linear_probe(
    features: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    new_features: Float[Tensor, "m d"],
    new_targets: Int[Tensor, " m"],
    classes: int,
) -> Classification:
    """Fit scikit-learn's logistic regression on pictures and classify others.

    As CLIP's README fits it (features as they are, `max_iter=1000`), with C searched as its paper says
    (arXiv:2103.00020, appendix A.3): from 1e-6 to 1e6 by hundreds, then at ever halved steps around the best,
    to an eighth of a decade; scored on a fifth of the pictures that is held out class by class. The smallest
    of equal C is taken. The last fit is on all of them.

    Raises:
        DataError: a class with fewer than two pictures, of which none could be held out, or one class alone.
        MissingExtraError: scikit-learn is not installed.
    """
    require("train", "sklearn")
    counts = targets.bincount(minlength=classes)
    if int((counts > 0).sum()) < 2 or int((counts == 1).sum()):
        lone = counts.eq(1).nonzero().flatten().tolist()
        raise DataError(
            f"a linear probe needs two classes or more, each with two pictures to fit on; "
            f"{f'class {lone[0]} has one' if lone else 'there is one class'}"
        )
    from sklearn.model_selection import train_test_split

    held_out = max(round(HELD_OUT * len(targets)), int((counts > 0).sum()))
    fitted, chosen = train_test_split(
        np.arange(len(targets)), test_size=held_out, stratify=targets.numpy(), random_state=0
    )
    known, labels = features.numpy(), targets.numpy()

    def accuracy(power: float) -> float:
        scores = _fit(known[fitted], labels[fitted], known[chosen], classes, 10**power)
        return classification_of_scores(scores, targets[chosen]).accuracy()

    tried = {float(power): accuracy(power) for power in COARSE}
    step = float(COARSE.step)
    while step > FINEST:
        step /= 2
        best = _best(tried)
        for power in (best - step, best + step):
            if COARSE[0] <= power <= COARSE[-1]:
                tried[power] = accuracy(power)
    scores = _fit(known, labels, new_features.numpy(), classes, 10 ** _best(tried))
    return classification_of_scores(scores, new_targets)


def _best(tried: dict[float, float]) -> float:
    return max(tried, key=lambda power: (tried[power], -power))


def _fit(
    known: NDArray[np.float32],
    labels: NDArray[np.int64],
    new: NDArray[np.float32],
    classes: int,
    c: float,
) -> Float[Tensor, "m c"]:
    """Scores of every class; of those that no picture was fitted on, the lowest there is."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # At large C the search is cut off at max_iter, as CLIP's is.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, random_state=0).fit(known, labels)
    scores = torch.full((len(new), classes), -math.inf, dtype=torch.double)
    found = torch.from_numpy(model.decision_function(new)).double()
    # Of two classes, scikit-learn gives the score of the second alone.
    scores[:, model.classes_] = found if found.ndim == 2 else torch.stack([-found, found], dim=1)
    return scores
