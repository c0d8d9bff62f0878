"""Batches of conversations of about one length, those of text alone apart from those with pictures."""

from __future__ import annotations

import numpy as np

from vlm_vision.train.order import EpochOrder, Places

WINDOW = 50
"""Batches that are sorted together, as in transformers' LengthGroupedSampler: more is less random."""
_BATCHES = 2  # tells the shuffle of batches from those of records


class LengthGroups(EpochOrder):
    """An order with the same draws an epoch, dealt to batches by what they hold and how long they are.

    Draws are taken in windows in the order beneath, sorted by length, and cut into batches, which are
    shuffled. What fills no batch of its kind makes mixed ones; what fills none at all comes last. A batch
    descends in length: ranks, which take every world-th sample, and their micro batches get similar ones.

    Args:
        order: beneath, a function of (seed, epoch).
        lengths: tokens of each record.
        has_pictures: whether it shows any.
    """

    def __init__(
        self, order: EpochOrder, lengths: Places, has_pictures: Places, batch_size: int, seed: int
    ) -> None:
        self._order, self._lengths, self._has_pictures = order, lengths, has_pictures.astype(bool)
        self._batch_size, self._seed = batch_size, seed
        self.size, self.lanes = order.size, 1
        self._arranged: dict[int, Places] = {}

    def draws(self, epoch: int, slots: Places) -> Places:
        """As `EpochOrder.draws`."""
        if epoch not in self._arranged:
            self._arranged = {epoch: self._arrange(epoch)}
        return self._arranged[epoch][slots]

    def _arrange(self, epoch: int) -> Places:
        draws = self._order.draws(epoch, np.arange(self.size))
        pictured = self._has_pictures[draws % len(self._lengths)]
        batches, rest = [], []
        for kind in (draws[pictured], draws[~pictured]):
            for window in self._windows(kind):
                whole = len(window) // self._batch_size * self._batch_size
                batches.append(window[:whole].reshape(-1, self._batch_size))
                rest.append(window[whole:])
        left = self._by_length(np.concatenate(rest))
        whole = len(left) // self._batch_size * self._batch_size
        batches.append(left[:whole].reshape(-1, self._batch_size))
        shuffled = np.random.default_rng((self._seed, epoch, _BATCHES)).permutation(np.concatenate(batches))
        return np.concatenate([shuffled.reshape(-1), left[whole:]])

    def _windows(self, draws: Places) -> list[Places]:
        step = WINDOW * self._batch_size
        return [self._by_length(draws[first : first + step]) for first in range(0, len(draws), step)]

    def _by_length(self, draws: Places) -> Places:
        found: Places = draws[np.argsort(-self._lengths[draws % len(self._lengths)], kind="stable")]
        return found
