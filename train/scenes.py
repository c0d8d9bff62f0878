"""The demo's scene set: drawn pictures of coloured shapes, written as the ordinary files that users have.

`sample_scene` makes a scene, `draw` its picture, `captions` and `questions` its texts, `write_scenes` the
files: PNG pictures, CSV captions, LLaVA-format JSON conversations, CSV class labels. Another generator only
has to write the same files. An item follows from (seed, split, index) alone, whatever the others are.
"""

from __future__ import annotations

import colorsys
import csv
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from vlm_vision.config import Config
from vlm_vision.progress import progress_bar

T = TypeVar("T")
RGB = tuple[int, int, int]
Pair = tuple[str, str]
Split = Literal["train", "val", "unseen", "classes"]

# Hue, saturation and value of each colour; the objects jitter around them.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.0, 0.92, 0.88),
    "green": (0.36, 0.9, 0.65),
    "blue": (0.61, 0.92, 0.92),
    "yellow": (0.155, 0.95, 0.98),
    "purple": (0.79, 0.8, 0.7),
    "orange": (0.085, 0.98, 0.98),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES: dict[str, float] = {"small": 0.16, "large": 0.22}  # radius as a share of the picture
PAIRS: tuple[Pair, ...] = tuple(product(COLOURS, SHAPES))

# Never in a picture, caption or question for training. No two share a colour or a shape: those stay common.
UNSEEN_PAIRS: tuple[Pair, ...] = (
    ("red", "cross"),
    ("blue", "triangle"),
)
SEEN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

# Objects stand near the nodes of a 2 by 2 grid: a place has one name, and left is never a matter of a pixel.
GRID = (0.27, 0.73)
SIDES = ("left", "right")
PLACES = (("at the top left", "at the top right"), ("at the bottom left", "at the bottom right"))
BACKGROUNDS = ("plain", "gradient", "stripes", "noise")
SPLITS: tuple[Split, ...] = ("train", "val", "unseen", "classes")
MAX_OBJECTS = 3
OVERSAMPLING = 4  # shapes are drawn this much larger, then averaged down

PHOTO_OF = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "there is {}", "this is {}")
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
ASK_COLOUR = ("What colour is the {}?", "Which colour does the {} have?")
ASK_SHAPE = ("What shape is the {} object?", "Which shape does the {} object have?")
ASK_COUNT = ("How many objects are there?", "How many shapes are in the picture?")
ASK_EXISTS = ("Is there {}?", "Does the picture show {}?")
ASK_SIDE = ("Is the {} on the left or on the right?", "On which side is the {}, left or right?")
ASK_BESIDE = ("Is the {} left or right of the {}?", "On which side of the {1} is the {0}, left or right?")


class SceneConfig(Config):
    """How many pictures of which size; the seed decides everything in them.

    Attributes:
        train_pictures, val_pictures: multiples of 24 make the balance of answers exact.
        unseen_pictures: held-out pictures with an object of an unseen colour-shape pair.
        pictures_per_class: held-out single-object pictures for each of the 30 colour-shape classes.
    """

    seed: int = 0
    image_size: int = Field(default=64, ge=32)
    train_pictures: int = Field(default=12000, ge=1)
    val_pictures: int = Field(default=480, ge=1)
    unseen_pictures: int = Field(default=192, ge=1)
    pictures_per_class: int = Field(default=20, ge=1)


@dataclass(frozen=True)
class SceneObject:
    """One shape. Lengths and positions are shares of the picture's side, rotation is in radians."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    x: float
    y: float
    radius: float
    rotation: float
    rgb: RGB

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def side(self) -> str:
        return SIDES[self.column]

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Background:
    """A muted backdrop of two greyish tones; `angle` turns gradients and stripes, `seed` makes the noise."""

    kind: str
    first: RGB
    second: RGB
    angle: float
    stripes: float
    seed: int


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: Background

    def side_by_side(self) -> list[tuple[SceneObject, SceneObject]]:
        """Every ordered pair of objects of which one is clearly left of the other."""
        return [(a, b) for a, b in permutations(self.objects, 2) if a.column != b.column]


@dataclass(frozen=True)
class Question:
    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class ScenePaths:
    """The files of a scene set; pictures are named relative to `folder`."""

    folder: Path

    @property
    def train_csv(self) -> Path:
        return self.folder / "train.csv"

    @property
    def val_csv(self) -> Path:
        return self.folder / "val.csv"

    @property
    def classes_csv(self) -> Path:
        return self.folder / "classes.csv"

    @property
    def captions_json(self) -> Path:
        return self.folder / "captions.json"

    @property
    def train_json(self) -> Path:
        return self.folder / "train.json"

    @property
    def val_json(self) -> Path:
        return self.folder / "val.json"

    @property
    def val_unseen_json(self) -> Path:
        return self.folder / "val_unseen.json"


# ---------------------------------------------------------------- sampling


def item_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The one source of chance of an item."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def sample_item(seed: int, split: Split, index: int) -> tuple[Scene, np.random.Generator]:
    """Scene of an item, and its generator to go on with for the texts.

    Counts of objects and the classes go round with the index, which balances them exactly.
    """
    rng = item_rng(seed, split, index)
    if split == "classes":
        return sample_scene(rng, [PAIRS[index % len(PAIRS)]]), rng
    count = 1 + index % MAX_OBJECTS
    pairs = [SEEN_PAIRS[i] for i in rng.permutation(len(SEEN_PAIRS))[:count]]
    if split == "unseen":
        pairs[0] = UNSEEN_PAIRS[index // MAX_OBJECTS % len(UNSEEN_PAIRS)]
    return sample_scene(rng, pairs), rng


def sample_scene(rng: np.random.Generator, pairs: Sequence[Pair]) -> Scene:
    """A scene of objects with these colours and shapes: apart from each other, not all in one column."""
    while True:
        objects = tuple(_sample_object(rng, colour, shape) for colour, shape in pairs)
        apart = all(
            math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 0.02 for a, b in permutations(objects, 2)
        )
        if apart and (len(objects) == 1 or len({thing.column for thing in objects}) > 1):
            return Scene(objects, _sample_background(rng))


def _sample_object(rng: np.random.Generator, colour: str, shape: str) -> SceneObject:
    size = pick(rng, tuple(SIZES))
    row, column = (int(i) for i in rng.integers(len(GRID), size=2))
    radius = SIZES[size] * rng.uniform(0.94, 1.06)
    margin = 1.15 * radius + 0.01  # the longest outline, a star's
    y, x = (min(max(GRID[i] + rng.uniform(-0.04, 0.04), margin), 1 - margin) for i in (row, column))
    hue, saturation, value = COLOURS[colour]
    rgb = _rgb(
        hue + rng.uniform(-0.01, 0.01),
        min(1.0, saturation * rng.uniform(0.92, 1.05)),
        min(1.0, value * rng.uniform(0.92, 1.05)),
    )
    return SceneObject(colour, shape, size, row, column, x, y, radius, rng.uniform(-0.15, 0.15), rgb)


def _sample_background(rng: np.random.Generator) -> Background:
    first, second = (_rgb(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.05, 0.4)) for _ in range(2))
    return Background(
        pick(rng, BACKGROUNDS),
        first,
        second,
        angle=rng.uniform(0, 2 * math.pi),
        stripes=rng.uniform(3, 7),
        seed=int(rng.integers(2**31)),
    )


def _rgb(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


# ---------------------------------------------------------------- drawing


def draw(scene: Scene, image_size: int = 64) -> Image.Image:
    """The scene as an RGB picture of `image_size` by `image_size` pixels, edges antialiased."""
    picture = _draw_background(scene.background, image_size)
    large = image_size * OVERSAMPLING
    for thing in scene.objects:
        mask = Image.new("L", (large, large))
        pen = ImageDraw.Draw(mask)
        outline = [(x * large, y * large) for x, y in _outline(thing)]
        if thing.shape == "circle":
            pen.ellipse(outline, fill=255)
        else:
            pen.polygon(outline, fill=255)
        picture.paste(thing.rgb, mask=mask.reduce(OVERSAMPLING))
    return picture


def _outline(thing: SceneObject) -> list[tuple[float, float]]:
    """Corners of the shape (of a circle, its bounding box), sized so that all look about equally large."""
    if thing.shape == "circle":
        reach = 0.9 * thing.radius
        return [(thing.x - reach, thing.y - reach), (thing.x + reach, thing.y + reach)]
    if thing.shape == "square":
        polar = [(1.13, math.pi / 4 + quarter * math.pi / 2) for quarter in range(4)]
    elif thing.shape == "triangle":
        polar = [(1.15, third * 2 * math.pi / 3) for third in range(3)]
    elif thing.shape == "star":
        polar = [(0.46 if tenth % 2 else 1.15, tenth * math.pi / 5) for tenth in range(10)]
    else:
        half = 0.33  # of an arm's width, against a length of 1
        corner, tip, turn = math.hypot(half, half), math.hypot(1, half), math.atan2(half, 1)
        polar = [
            (radius, quarter * math.pi / 2 + angle)
            for quarter in range(4)
            for radius, angle in ((tip, -turn), (tip, turn), (corner, math.pi / 4))
        ]
    return [
        (
            thing.x + thing.radius * radius * math.sin(thing.rotation + angle),
            thing.y - thing.radius * radius * math.cos(thing.rotation + angle),
        )
        for radius, angle in polar
    ]


def _draw_background(background: Background, image_size: int) -> Image.Image:
    if background.kind == "plain":
        return Image.new("RGB", (image_size, image_size), background.first)
    if background.kind == "noise":
        rng = np.random.default_rng(background.seed)
        share = rng.random((image_size, image_size), dtype=np.float32)
    else:
        line = np.linspace(-0.5, 0.5, image_size, dtype=np.float32)
        along = math.cos(background.angle) * line[None, :] + math.sin(background.angle) * line[:, None]
        if background.kind == "gradient":
            share = np.clip(along / math.sqrt(2) + 0.5, 0, 1)
        else:  # a steep wave, whose flanks are the antialiasing
            share = np.clip(0.5 + 3 * np.sin(2 * math.pi * background.stripes * along), 0, 1)
    first, second = (np.array(tone, dtype=np.float32) for tone in (background.first, background.second))
    return Image.fromarray((first + share[..., None] * (second - first)).astype(np.uint8))


# ---------------------------------------------------------------- texts


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Three captions: all that is known, how objects stand to each other (or where), their names alone."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    names = _listing([with_article(thing.name) for thing in objects])
    if len(objects) == 1:
        related = f"{with_article(objects[0].name)} {objects[0].place}"
    else:
        a, b = pick(rng, scene.side_by_side())
        others = [f", and {with_article(thing.name)}" for thing in objects if thing not in (a, b)]
        side = "left" if a.x < b.x else "right"
        related = f"{with_article(a.name)} to the {side} of {with_article(b.name)}{''.join(others)}"
    return [describe(scene), pick(rng, PHOTO_OF).format(related), pick(rng, PHOTO_OF).format(names)]


def describe(scene: Scene) -> str:
    """Size, colour, shape and place of every object, from left to right: equal for scenes that look alike."""
    ordered = sorted(scene.objects, key=lambda thing: (thing.column, thing.row))
    return _listing([with_article(f"{thing.size} {thing.name} {thing.place}") for thing in ordered])


def questions(
    scene: Scene, rng: np.random.Generator, balance: int, about: SceneObject | None = None
) -> list[Question]:
    """Questions with one-word answers, in random order: of colour, shape, count, presence and side.

    Colour and shape are asked only of an object that its shape or colour picks out.

    Args:
        balance: its bits say which answers the yes/no and left/right questions get; counting up over the
            items of a set gives each answer equally often.
        about: ask only about this object, and not for the count.
    """
    subjects = scene.objects if about is None else (about,)
    shapes = Counter(thing.shape for thing in scene.objects)
    colours = Counter(thing.colour for thing in scene.objects)
    asked: list[Question] = []
    if lone := [thing for thing in subjects if shapes[thing.shape] == 1]:
        thing = pick(rng, lone)
        asked.append(Question("colour", pick(rng, ASK_COLOUR).format(thing.shape), thing.colour))
    if lone := [thing for thing in subjects if colours[thing.colour] == 1]:
        thing = pick(rng, lone)
        asked.append(Question("shape", pick(rng, ASK_SHAPE).format(thing.colour), thing.shape))
    if about is None:
        asked.append(Question("count", pick(rng, ASK_COUNT), str(len(scene.objects))))

    colour, shape = pick(rng, subjects).pair
    there = balance & 1
    if not there:
        colour, shape = pick(rng, pick(rng, absent_pairs(scene, (colour, shape))))
    text = pick(rng, ASK_EXISTS).format(with_article(f"{colour} {shape}"))
    asked.append(Question("exists", text, "yes" if there else "no"))

    asked.append(_ask_side(scene, rng, subjects, "right" if balance & 2 else "left"))
    return [asked[i] for i in rng.permutation(len(asked))]


def _ask_side(
    scene: Scene, rng: np.random.Generator, subjects: Sequence[SceneObject], answer: str
) -> Question:
    """Where an object is: half of the time, if there is another beside it, as seen from that one.

    The answer is the one asked for, unless no subject is on that side.
    """
    shapes = Counter(thing.shape for thing in scene.objects)

    def name(thing: SceneObject) -> str:
        return thing.shape if shapes[thing.shape] == 1 else thing.name

    beside = [(a, b) for a, b in scene.side_by_side() if a.x < b.x and (a in subjects or b in subjects)]
    if beside and rng.random() < 0.5:
        left, right = pick(rng, beside)
        a, b = (left, right) if answer == "left" else (right, left)
        return Question("side", pick(rng, ASK_BESIDE).format(name(a), name(b)), answer)
    thing = pick(rng, [thing for thing in subjects if thing.side == answer] or subjects)
    return Question("side", pick(rng, ASK_SIDE).format(name(thing)), thing.side)


def absent_pairs(scene: Scene, pair: Pair) -> list[list[Pair]]:
    """Pairs that are not in the scene: those that share the colour of `pair`, its shape, or neither.

    Unseen pairs are none of them: a model would learn that those are never there.
    """
    present = {thing.pair for thing in scene.objects}
    absent = [other for other in SEEN_PAIRS if other not in present]
    groups = [
        [other for other in absent if (other[0] == pair[0], other[1] == pair[1]) == shared]
        for shared in ((True, False), (False, True), (False, False))
    ]
    return [group for group in groups if group]


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _listing(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# ---------------------------------------------------------------- files


def write_scenes(config: SceneConfig, folder: str | Path) -> ScenePaths:
    """Draw the whole set into `folder` and write its tables and conversations."""
    paths = ScenePaths(Path(folder))
    numbers: dict[Split, int] = {
        "train": config.train_pictures,
        "val": config.val_pictures,
        "unseen": config.unseen_pictures,
        "classes": config.pictures_per_class * len(PAIRS),
    }
    with progress_bar(sum(numbers.values()), "drawing scenes") as bar:

        def items(split: Split) -> Iterator[tuple[int, str, Scene, np.random.Generator]]:
            (paths.folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for index in range(numbers[split]):
                scene, rng = sample_item(config.seed, split, index)
                image = f"images/{split}/{index + 1:06d}.png"
                draw(scene, config.image_size).save(paths.folder / image, compress_level=1)
                yield index, image, scene, rng
                bar.update()

        _write_train(paths, items("train"))
        _write_val(paths, items("val"))
        conversations = [
            conversation(image, questions(scene, rng, index, about=scene.objects[0]))
            for index, image, scene, rng in items("unseen")
        ]
        _write_json(paths.val_unseen_json, conversations)
        labels = [(image, scene.objects[0].name) for _, image, scene, _ in items("classes")]
        _write_csv(paths.classes_csv, ("image", "label"), labels)
    return paths


def _write_train(paths: ScenePaths, items: Iterable[tuple[int, str, Scene, np.random.Generator]]) -> None:
    rows, described, conversations = [], [], []
    for index, image, scene, rng in items:
        rows += [(image, caption) for caption in captions(scene, rng)]
        described.append(conversation(image, [Question("caption", pick(rng, DESCRIBE), describe(scene))]))
        conversations.append(conversation(image, questions(scene, rng, index)))
    _write_csv(paths.train_csv, ("image", "caption"), rows)
    _write_json(paths.captions_json, described)
    _write_json(paths.train_json, conversations)


def _write_val(paths: ScenePaths, items: Iterable[tuple[int, str, Scene, np.random.Generator]]) -> None:
    """A description that fits two pictures stays in the table once: retrieval needs one right answer."""
    rows: dict[str, str] = {}
    conversations = []
    for index, image, scene, rng in items:
        rows.setdefault(describe(scene), image)
        conversations.append(conversation(image, questions(scene, rng, index)))
    _write_csv(paths.val_csv, ("image", "caption"), [(image, caption) for caption, image in rows.items()])
    _write_json(paths.val_json, conversations)


def conversation(image: str, asked: Sequence[Question]) -> dict[str, Any]:
    """A record of LLaVA's training JSON; the extra key `type` of an answer is ignored by its readers."""
    turns: list[dict[str, str]] = []
    for question in asked:
        text = question.text if turns else f"<image>\n{question.text}"
        turns += [
            {"from": "human", "value": text},
            {"from": "gpt", "value": question.answer, "type": question.type},
        ]
    return {"id": Path(image).with_suffix("").as_posix(), "image": image, "conversations": turns}


def _write_json(path: Path, records: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(record) for record in records)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


# ---------------------------------------------------------------- what the questions give away


def asked_questions(records: Iterable[dict[str, Any]]) -> Iterator[Question]:
    """Every question of LLaVA-format records with its answer; the type is empty where a record names none."""
    for record in records:
        turns = record["conversations"]
        for human, answer in zip(turns[::2], turns[1::2], strict=True):
            text = human["value"].replace("<image>", "").strip()
            yield Question(answer.get("type", ""), text, answer["value"])


def blind_accuracy(train: Iterable[dict[str, Any]], held_out: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Accuracy by question type of the best answer without the picture.

    That answer is the most frequent one that the same question text has in training, or, for a new text, the
    most frequent one of its type.
    """
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_type: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in asked_questions(train):
        by_text[question.text][question.answer] += 1
        by_type[question.type][question.answer] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for question in asked_questions(held_out):
        answers = by_text.get(question.text) or by_type[question.type]
        right[question.type] += answers.most_common(1)[0][0] == question.answer
        total[question.type] += 1
    return {kind: right[kind] / total[kind] for kind in sorted(total)}
