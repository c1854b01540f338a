"""Image file to pixels. Preprocessing is part of an artifact's contract: see `Preprocessing`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .errors import ExportError


class Strategy(StrEnum):
    """How an image that is not square becomes one.

    `pad`: centred on a square of the mean colour, then resized (LLaVA's `predict.py`).
    `crop`: shortest edge resized, then cut from the centre (Apple's app, Transformers.js).
    `stretch`: resized to the square, whatever its proportions.
    """

    PAD = "pad"
    CROP = "crop"
    STRETCH = "stretch"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """RGB -> square of `resolution` by `strategy`, PIL bicubic -> (x / 255 - mean) / std."""

    strategy: Strategy
    resolution: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resampling: str = "bicubic"


def read_image(path: Path) -> Image.Image:
    """An image file as RGB. Stored orientation flags are ignored, as the original does."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ExportError(
            f"There is no image {path}.", "Check the path given to --image."
        ) from error
    except (
        OSError,
        SyntaxError,  # what PIL raises for a damaged PNG
        ValueError,
        Image.DecompressionBombError,
        UnidentifiedImageError,
    ) as error:
        raise ExportError(
            f"{path} cannot be read as an image: {error}",
            "Give --image a complete PNG, JPEG or WebP file.",
        ) from error


def square(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The image as an RGB square of `preprocessing.resolution` pixels."""
    size = preprocessing.resolution
    width, height = image.size
    match preprocessing.strategy:
        case Strategy.PAD if width != height:
            side = max(width, height)
            background = tuple(int(255 * channel) for channel in preprocessing.mean)
            canvas = Image.new("RGB", (side, side), background)
            canvas.paste(image, ((side - width) // 2, (side - height) // 2))
            image = canvas
        case Strategy.CROP:
            short = min(width, height)
            scaled = (int(size * width / short), int(size * height / short))
            image = image.resize(scaled, Image.Resampling.BICUBIC)
            left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
            return image.crop((left, top, left + size, top + size))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """RGB image -> pixels [1,3,R,R], float32."""
    levels = np.arange(256, dtype=np.float64) * (1 / 255)
    image_values = np.asarray(square(image, preprocessing))  # [R,R,3] uint8
    pixels = np.empty((1, 3, preprocessing.resolution, preprocessing.resolution), np.float32)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        # A pixel has 256 values: look the result up, rather than compute on float64 images.
        table = ((levels - mean) / std).astype(np.float32)
        np.take(table, image_values[..., channel], out=pixels[0, channel], mode="clip")
    return pixels
