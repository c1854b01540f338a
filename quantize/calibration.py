"""The images that static activation ranges are taken from."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from ..exporter.errors import ExportError
from ..exporter.preprocess import Preprocessing, preprocess, read_image
from ..exporter.samples import PHOTOGRAPH, samples

SECOND_PHOTOGRAPH = "china.jpg"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# All are held in memory, and each is one run of the float tower: seconds at 1024 pixels.
MOST_IMAGES = 100
SHOWN_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class CalibrationImage:
    """An RGB image; `sha256` covers its size and pixels, for the manifest."""

    name: str
    sha256: str
    image: Image.Image


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Images in order, and in words where they come from."""

    source: str
    images: tuple[CalibrationImage, ...]


def load(folder: Path | None) -> Calibration:
    """The images of a folder by name, not of its subfolders; without one, those that ship with us.

    Raises one ExportError for a folder that is missing, empty, too full, or has unreadable images.
    """
    if folder is None:
        return _default()
    problems: list[str] = []
    images = []
    for path in _files(folder):
        try:
            images.append(_named(path.name, read_image(path)))
        except ExportError as error:
            problems.append(error.message)
    if problems:
        shown = problems[:SHOWN_PROBLEMS]
        if more := len(problems) - len(shown):
            shown.append(f"and {more} more")
        raise ExportError(
            "Calibration images cannot be used:\n  " + "\n  ".join(shown),
            f"Replace or remove them, or give --calibration another folder than {folder}.",
        )
    return Calibration(source=folder.resolve().name, images=tuple(images))


def pixels(calibration: Calibration, preprocessing: Preprocessing) -> list[Tensor]:
    """Every image as the vision graph reads it: [1,3,R,R] float32."""
    return [torch.from_numpy(preprocess(one.image, preprocessing)) for one in calibration.images]


def _files(folder: Path) -> list[Path]:
    kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    hint = (
        f"Give --calibration a folder with images ({kinds}), or leave it out: "
        "the package brings its own."
    )
    if not folder.exists():
        raise ExportError(f"There is no calibration folder {folder}.", hint)
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file, not a folder of calibration images.", hint)
    try:
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise ExportError(f"{folder} cannot be read: {error.strerror}.", hint) from error
    # Hidden files are what desktops leave behind, named after images.
    found = [
        path
        for path in paths
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    if not found:
        raise ExportError(f"{folder} has no images.", hint)
    if len(found) > MOST_IMAGES:
        raise ExportError(
            f"{folder} has {len(found)} images; calibration takes at most {MOST_IMAGES}.",
            "Copy a varied few dozen into a folder and give --calibration that one.",
        )
    return found


def _default() -> Calibration:
    """The canvases, two photographs, and the quarters of both.

    Quarters, because a tower meets blur and sharp detail, dark and bright at every scale: enlarged,
    a quarter of a photograph shows what its reduced whole does not.
    """
    named = [(sample.name, sample.image) for sample in samples(())]
    second = Image.fromarray(load_sample_image(SECOND_PHOTOGRAPH)).convert("RGB")
    named.append((SECOND_PHOTOGRAPH, second))
    for name, image in list(named):
        if name in (PHOTOGRAPH, SECOND_PHOTOGRAPH):
            named += _quarters(name, image)
    return Calibration(
        source="the package's canvases, two photographs and their quarters",
        images=tuple(_named(name, image) for name, image in named),
    )


def _quarters(name: str, image: Image.Image) -> list[tuple[str, Image.Image]]:
    width, height = image.width // 2, image.height // 2
    return [
        (f"{name} {part}", image.crop((left, top, left + width, top + height)))
        for part, left, top in (
            ("top left", 0, 0),
            ("top right", width, 0),
            ("bottom left", 0, height),
            ("bottom right", width, height),
        )
    ]


def _named(name: str, image: Image.Image) -> CalibrationImage:
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return CalibrationImage(name=name, sha256=digest.hexdigest(), image=image)
