from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import (
    Preprocessing,
    Strategy,
    preprocess,
    read_image,
    square,
)

from .. import oracles


def photograph(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (100, 100), (33, 500), (64, 64)])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_to_the_pixel_as_llava_and_clip_do(size: tuple[int, int], strategy: Strategy) -> None:
    transformers = oracles.libraries()
    image = photograph(*size)
    resolution = 64
    ours = preprocess(image, Preprocessing(strategy=strategy, resolution=resolution))
    oracle = transformers.CLIPImageProcessorPil(
        size={"height": resolution, "width": resolution}
        if strategy is Strategy.STRETCH
        else {"shortest_edge": resolution},
        crop_size={"height": resolution, "width": resolution},
        do_center_crop=strategy is not Strategy.STRETCH,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    if strategy is Strategy.PAD:
        side = max(size)
        canvas = Image.new("RGB", (side, side), (0, 0, 0))
        canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        image = canvas
    theirs = np.asarray(oracle(image, return_tensors="np")["pixel_values"])
    assert ours.shape == theirs.shape == (1, 3, resolution, resolution)
    assert np.abs(ours - theirs).max() <= 1e-6


def test_padding_is_centred_and_of_the_mean_colour() -> None:
    contract = Preprocessing(strategy=Strategy.PAD, resolution=8, mean=(0.5, 0.0, 1.0))
    out = np.asarray(square(Image.new("RGB", (8, 4), (255, 255, 255)), contract))
    assert out[0, 0].tolist() == out[-1, 0].tolist() == [127, 0, 255]
    assert (out[3:5] == 255).all()


def test_mean_and_std_are_applied() -> None:
    contract = Preprocessing(
        strategy=Strategy.STRETCH, resolution=4, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0)
    )
    out = preprocess(Image.new("RGB", (9, 5), (255, 255, 255)), contract)
    assert out[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    photograph(9, 7).convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (9, 7))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "folder", "missing"])
def test_an_unreadable_image_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "image.png"
    photograph(50, 50).save(path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("not an image")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(ExportError, match=r"image\.png") as caught:
        read_image(path)
    assert caught.value.hint
