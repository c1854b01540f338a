"""The bundled task: questions about one to four real handwritten digits on a coloured canvas.

The scans are scikit-learn's `load_digits` (1,797 digits of 8x8 pixels), split once into a training
and a held-out part. Everything random comes from `random.Random`, whose streams are stable over
versions and platforms, and the pixels are composed in integers, so `evaluation_set` gives the same
images everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESOLUTION = 256
MAX_DIGITS = 4
HELD_OUT_DIGITS = 360
EVALUATION_SEED = 20261121

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (196, 36, 40),
    "orange": (240, 136, 24),
    "yellow": (240, 220, 60),
    "green": (36, 140, 60),
    "blue": (36, 76, 196),
    "purple": (132, 44, 156),
    "black": (22, 22, 22),
    "white": (232, 232, 232),
}
_SHADE = 16  # each channel of a background differs by at most this from the named colour
_MARGIN = 6  # pixels between the row of digits and the edge


class Kind(StrEnum):
    """What a question asks about."""

    NUMBER = "number"
    COUNT = "count"
    COLOUR = "colour"


QUESTIONS: dict[Kind, str] = {
    Kind.NUMBER: "Read the number.",
    Kind.COUNT: "How many digits are there?",
    Kind.COLOUR: "What colour is the background?",
}


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One real digit: 8x8 uint8 ink coverage (0 paper, 255 full ink) and what it shows."""

    pixels: NDArray[np.uint8]
    label: int


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far training bends a scan: degrees, relative zoom, and shift in parts of its size."""

    rotation: float = 12.0
    zoom: float = 0.12
    shear: float = 0.15
    shift: float = 0.04
    ink: float = 0.35


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A canvas and the facts about it; `centres` are (x, y) pixels of each digit, left to right."""

    pixels: NDArray[np.uint8]  # [height, width, 3] RGB
    colour: str
    digits: str
    centres: tuple[tuple[float, float], ...]

    def answer(self, kind: Kind) -> str:
        """Return the one right answer to `QUESTIONS[kind]`."""
        if kind is Kind.NUMBER:
            return self.digits
        return str(len(self.digits)) if kind is Kind.COUNT else self.colour

    def caption(self) -> str:
        """Return the description used by the captioning stages of the training."""
        article = "An" if self.colour[0] in "aeiou" else "A"
        plural = "" if len(self.digits) == 1 else "s"
        return (
            f"{article} {self.colour} image with {len(self.digits)} digit{plural}: {self.digits}."
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of the evaluation; questions with the same `image_index` share their image."""

    image: Image.Image
    image_index: int
    kind: Kind
    text: str
    answer: str


@cache
def _split() -> tuple[tuple[Scan, ...], tuple[Scan, ...]]:
    """Split the scans of every label by the same share; deterministic."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - takes a second to import

    data = load_digits()
    scans = [
        Scan(pixels=np.minimum(image * 16, 255).astype(np.uint8), label=int(label))
        for image, label in zip(data.images, data.target, strict=True)
    ]
    rng = random.Random(0)  # noqa: S311 - reproducible, not secret
    train: list[Scan] = []
    held_out: list[Scan] = []
    for label in range(10):
        same = [scan for scan in scans if scan.label == label]
        rng.shuffle(same)
        count = HELD_OUT_DIGITS // 10
        held_out += same[:count]
        train += same[count:]
    return tuple(train), tuple(held_out)


def training_scans() -> tuple[Scan, ...]:
    """Return the 1,437 digits the bundled model was trained on."""
    return _split()[0]


def held_out_scans() -> tuple[Scan, ...]:
    """Return the 360 digits it never saw, 36 of each label."""
    return _split()[1]


def evaluation_set(n: int = 300) -> list[Question]:
    """Return `n` questions (a multiple of three) about held-out digits, the three kinds equally.

    Canvas i carries questions 3i, 3i+1 and 3i+2, so an encoder runs n/3 times. A longer set starts
    with the shorter one. Raises ValueError for another number of questions.
    """
    if n < 3 or n % 3:
        raise ValueError(f"the number of questions must be a positive multiple of three, not {n}")
    scenes = held_out_scenes(n // 3, seed=EVALUATION_SEED)
    return [
        Question(
            image=Image.fromarray(scene.pixels),
            image_index=index,
            kind=kind,
            text=text,
            answer=scene.answer(kind),
        )
        for index, scene in enumerate(scenes)
        for kind, text in QUESTIONS.items()
    ]


def held_out_scenes(count: int, *, seed: int) -> list[Scene]:
    """Return `count` canvases of held-out digits, dealt from a shuffled deck until it runs out."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    scans = held_out_scans()
    deck: list[Scan] = []
    scenes: list[Scene] = []
    for _ in range(count):
        length = rng.randint(1, MAX_DIGITS)
        if len(deck) < length:
            deck = rng.sample(scans, len(scans))
        scenes.append(compose(rng, [deck.pop() for _ in range(length)]))
    return scenes


def compose(
    rng: random.Random,
    scans: Sequence[Scan],
    *,
    height: int = RESOLUTION,
    width: int = RESOLUTION,
    augmentation: Augmentation | None = None,
) -> Scene:
    """Draw `scans` in a row on a canvas of random colour; `augmentation` bends them for training.

    Raises ValueError where the row is too long for the width (a digit needs up to 58 pixels).
    """
    size = rng.randint(48, 58)
    room = width - 2 * _MARGIN
    if size * len(scans) > room:
        raise ValueError(f"{len(scans)} digits of {size} pixels do not fit in {width}")
    pitch = size
    if len(scans) > 1:
        pitch = rng.randint(size, max(size, min(size * 5 // 4, (room - size) // (len(scans) - 1))))
    left = _MARGIN + rng.randint(0, room - size - pitch * (len(scans) - 1))
    top = _MARGIN + rng.randint(0, height - 2 * _MARGIN - size)

    coverage = np.zeros((height, width), np.uint8)
    centres: list[tuple[float, float]] = []
    for position, scan in enumerate(scans):
        x = left + position * pitch
        y = min(max(top + rng.randint(-4, 4), 0), height - size)
        drawn = _draw(rng, scan, size, augmentation)
        window = coverage[y : y + size, x : x + size]
        np.maximum(window, drawn, out=window)
        centres.append((x + size / 2, y + size / 2))

    colour, paper, ink = _paint(rng)
    pixels = _blend(rng, coverage, paper, ink)
    digits = "".join(str(scan.label) for scan in scans)
    return Scene(pixels=pixels, colour=colour, digits=digits, centres=tuple(centres))


def _draw(
    rng: random.Random, scan: Scan, size: int, augmentation: Augmentation | None
) -> NDArray[np.uint8]:
    """Enlarge one scan to [size, size] coverage, bent at random where an augmentation is given."""
    image = Image.fromarray(scan.pixels)
    if augmentation is None:
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    turn = np.deg2rad(rng.uniform(-augmentation.rotation, augmentation.rotation))
    shear = rng.uniform(-augmentation.shear, augmentation.shear)
    zoom_x = 1 + rng.uniform(-augmentation.zoom, augmentation.zoom)
    zoom_y = 1 + rng.uniform(-augmentation.zoom, augmentation.zoom)
    shift_x = rng.uniform(-augmentation.shift, augmentation.shift) * 8
    shift_y = rng.uniform(-augmentation.shift, augmentation.shift) * 8
    # PIL maps output to input: scale down to the 8x8 scan, turn and shear about its centre.
    padded = np.zeros((12, 12), np.uint8)
    padded[2:10, 2:10] = scan.pixels
    scale = 8 / size
    a = np.cos(turn) * zoom_x * scale
    b = (-np.sin(turn) + shear) * zoom_x * scale
    d = np.sin(turn) * zoom_y * scale
    e = np.cos(turn) * zoom_y * scale
    half = size / 2
    matrix = (a, b, 6 + shift_x - (a + b) * half, d, e, 6 + shift_y - (d + e) * half)
    bent = Image.fromarray(padded).transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    strength = 1 + rng.uniform(-augmentation.ink, augmentation.ink)
    drawn: NDArray[np.uint8] = np.clip(np.asarray(bent, np.float32) * strength, 0, 255).astype(
        np.uint8
    )
    return drawn


def _paint(rng: random.Random) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Choose a named background, its shade, and an ink that stands out from it."""
    colour = rng.choice(tuple(COLOURS))
    paper = tuple(channel + rng.randint(-_SHADE, _SHADE) for channel in COLOURS[colour])
    red, green, blue = paper
    bright = (299 * red + 587 * green + 114 * blue) // 1000 > 127
    low, high = (0, 50) if bright else (205, 255)
    return colour, paper, tuple(rng.randint(low, high) for _ in range(3))


def _blend(
    rng: random.Random,
    coverage: NDArray[np.uint8],
    paper: tuple[int, ...],
    ink: tuple[int, ...],
) -> NDArray[np.uint8]:
    """Lay ink on paper by coverage and add mild noise, in integers; [H,W] -> [H,W,3]."""
    height, width = coverage.shape
    amplitude = rng.randint(0, 8)
    noise = np.frombuffer(rng.randbytes(height * width), np.uint8).reshape(height, width)
    grain = (noise.astype(np.int16) - 128) * amplitude // 128
    amount = coverage.astype(np.int16)
    pixels = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        # 128 steps of coverage keep the product inside 16 bits.
        step = (amount >> 1) * (ink[channel] - paper[channel]) // 127
        pixels[..., channel] = np.clip(paper[channel] + step + grain, 0, 255)
    return pixels
