"""The images and questions that an artifact is proven on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

from .preprocess import read_image

PHOTOGRAPH = "flower.jpg"  # 640 x 427: not square, so that the preprocessing strategy matters
PHOTOGRAPH_QUESTION = "What is in this picture?"
USER_QUESTION = "Describe this image."


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An RGB image, the user's file that it came from if one did, and a question about it."""

    name: str
    image: Image.Image
    question: str
    path: Path | None = None


def samples(images: Sequence[Path]) -> list[Sample]:
    """The bundled canvases and a photograph, then the user's own images."""
    folder = resources.files(__package__) / "assets" / "images"
    listed = json.loads((folder / "samples.json").read_text("utf-8"))
    found = []
    for entry in listed:
        with resources.as_file(folder / entry["image"]) as path:
            found.append(
                Sample(name=entry["image"], image=read_image(path), question=entry["question"])
            )
    photograph = Image.fromarray(load_sample_image(PHOTOGRAPH)).convert("RGB")
    found.append(Sample(name=PHOTOGRAPH, image=photograph, question=PHOTOGRAPH_QUESTION))
    return found + [
        Sample(name=path.name, image=read_image(path), question=USER_QUESTION, path=path)
        for path in images
    ]
