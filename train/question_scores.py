"""Scores of answers, with intervals: VQAv2's accuracy, POPE's yes and no, multiple choice, captions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_vision.errors import DataError

Z95 = 1.959963984540054  # of the normal distribution, between whose two sides 95 % lie
RESAMPLES = 1000
FEWEST_ANSWERS = 4  # of people, below which no answer could reach 1 in `consensus`

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_SHORT_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
# As people type them: with one apostrophe left out.
_CONTRACTIONS = {
    form[: place.start()] + form[place.end() :]: form
    for form in _SHORT_FORMS.split()
    for place in re.finditer("'", form)
}


@dataclass(frozen=True)
class Score:
    """A figure and the ends of its 95 % interval; all None where nothing defines it."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def normalise_vqa(answer: str) -> str:
    """VQAv2's normalisation: no marks, articles or full stops, numbers as digits, apostrophes put back.

    A mark goes where a space is beside it in the text, or a comma stands between digits; elsewhere it becomes
    a space. As `vqaEval.py` of github.com/GT-Vision-Lab/VQA, whose entry that makes "somebodyd" of
    "somebody'd" is turned the right way.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    glued = re.search(r"\d,\d", text) is not None
    clean = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        clean = clean.replace(mark, "" if glued or beside_space else " ")
    words = re.sub(r"\.(?!\d)", "", clean).lower().split()
    words = [word for word in (_NUMBERS.get(word, word) for word in words) if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words)


def consensus(answer: str, people: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer: the mean, over leaving each person out, of min(1, agreeing others / 3).

    With one person's answer it is 1 or 0.

    Raises:
        DataError: two or three answers, with which the rule never gives 1.
    """
    said = normalise_vqa(answer)
    agrees = [said == normalise_vqa(other) for other in people]
    if len(people) == 1:
        return float(agrees[0])
    if len(people) < FEWEST_ANSWERS:
        raise DataError(
            f"{len(people)} answers: VQAv2's consensus needs {FEWEST_ANSWERS} (it has 10), "
            "or give the one true answer"
        )
    return sum(min(1.0, (sum(agrees) - own) / 3) for own in agrees) / len(people)


def says_no(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence holds "no" or "not", else yes.

    As LLaVA's `eval_pope.py` but for "NO", "Not" and "no!", which it takes for a yes.
    """
    return not {"no", "not"}.isdisjoint(_words(answer.partition(".")[0]))


def is_yes_or_no(answer: str) -> bool:
    """Whether an answer says either; POPE counts what says neither as a yes."""
    return says_no(answer) or "yes" in _words(answer.partition(".")[0])


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer names, by its letter or by its text; None if it names none.

    "B", "(B)", "B. a cat", "The answer is B." and "a cat" name the second of (a dog, a cat).
    """
    text = answer.strip()
    letters = "".join(letter(number) for number in range(len(choices)))
    for pattern in (rf"\(?([{letters}])(?:[).:,].*|\s*$)", rf".*\banswer is:? \(?([{letters}])\b"):
        found = re.match(pattern, text, re.DOTALL | (re.IGNORECASE if len(text) == 1 else 0))
        if found:
            return letters.index(found[1].upper())
    same = [number for number, choice in enumerate(choices) if normalise_vqa(choice) == normalise_vqa(text)]
    return same[0] if len(same) == 1 else None


def letter(number: int) -> str:
    """A, B, C, ..."""
    return chr(ord("A") + number)


def wilson(right: float, count: int) -> Score:
    """A share and its Wilson interval (Wilson 1927), which is sound near 0 and 1 and for few questions."""
    if count == 0:
        return Score(None)
    share, spread = right / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return Score(share, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    parts: NDArray[np.floating[Any]],
    groups: Sequence[Hashable],
    statistic: Callable[[NDArray[np.floating[Any]]], float | None],
    *,
    seed: int = 0,
) -> Score:
    """A statistic of sums, and its percentile interval over resampled groups (Efron 1979).

    Args:
        parts: [questions, k], what is summed over questions.
        groups: of each question what is drawn as a whole: questions about one picture go together.
        statistic: of the k sums; None where they do not define it.
    """
    value = statistic(parts.sum(axis=0))
    if value is None:
        return Score(None)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(places), parts.shape[1]))
    np.add.at(sums, [places[group] for group in groups], parts)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(0, len(sums), len(sums)), minlength=len(sums))
        found = statistic(times @ sums)
        if found is not None:
            drawn.append(found)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Score(value, float(low), float(high))


def vqa_scores(accuracies: Sequence[float], groups: Sequence[Hashable], *, exact: bool) -> dict[str, Score]:
    """Mean of `consensus`.

    Args:
        exact: each is 0 or 1, as with one true answer; the interval is Wilson's then.
    """
    if exact:
        return {"accuracy": wilson(sum(accuracies), len(accuracies))}
    return {"accuracy": mean_score(accuracies, groups)}


def yes_no_scores(
    no: Sequence[bool], truth_is_no: Sequence[bool], clear: Sequence[bool], groups: Sequence[Hashable]
) -> dict[str, Score]:
    """POPE's figures (arXiv:2305.10355), yes being the positive; `unclear` is the share that said neither."""
    said, true = ~np.array(no, dtype=bool), ~np.array(truth_is_no, dtype=bool)
    hits, count = int((said & true).sum()), len(said)
    parts = np.stack([said & true, said, true], axis=1).astype(float)
    return {
        "accuracy": wilson(int((said == true).sum()), count),
        "precision": wilson(hits, int(said.sum())),
        "recall": wilson(hits, int(true.sum())),
        "f1": bootstrap(parts, groups, _f1),
        "yes_ratio": wilson(int(said.sum()), count),
        "unclear": wilson(count - sum(clear), count),
    }


def choice_scores(right: Sequence[bool], clear: Sequence[bool]) -> dict[str, Score]:
    """Share of right choices; `unclear` is the share of answers that named no choice, which are wrong."""
    return {
        "accuracy": wilson(sum(right), len(right)),
        "unclear": wilson(len(clear) - sum(clear), len(clear)),
    }


def caption_scores(
    losses: Sequence[float], tokens: Sequence[int], groups: Sequence[Hashable]
) -> dict[str, Score]:
    """Loss per token, in nats, over all captions.

    Args:
        losses: of each caption, summed over its tokens.
    """
    parts = np.stack([np.array(losses, dtype=float), np.array(tokens, dtype=float)], axis=1)
    return {"loss": bootstrap(parts, groups, lambda sums: float(sums[0] / sums[1]))}


def mean_score(values: Sequence[float], groups: Sequence[Hashable]) -> Score:
    """A mean over questions, with its interval by pictures."""
    parts = np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1)
    return bootstrap(parts, groups, lambda sums: float(sums[0] / sums[1]))


def _f1(sums: NDArray[np.floating[Any]]) -> float | None:
    """2 TP / (positives said + positives true)."""
    return float(2 * sums[0] / (sums[1] + sums[2])) if sums[1] + sums[2] else None


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())
