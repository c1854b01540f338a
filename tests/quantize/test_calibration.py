from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy, preprocess
from fastvlm_export.quantize import calibration

PREPROCESSING = Preprocessing(strategy=Strategy.PAD, resolution=64)


def save(path: Path, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(values)
    image.save(path)
    return image


def test_the_default_images_are_varied_and_the_same_every_time() -> None:
    found, again = calibration.load(None), calibration.load(None)
    assert [one.sha256 for one in found.images] == [one.sha256 for one in again.images]
    names = [one.name for one in found.images]
    assert len(names) == len(set(names)) == len({one.sha256 for one in found.images}) == 14
    assert {"green-425.png", "flower.jpg", "china.jpg", "china.jpg top left"} <= set(names)
    assert all(one.image.mode == "RGB" for one in found.images)


def test_quarters_make_up_their_photograph() -> None:
    images = {one.name: np.asarray(one.image) for one in calibration.load(None).images}
    rows = [
        np.hstack([images[f"china.jpg {part} left"], images[f"china.jpg {part} right"]])
        for part in ("top", "bottom")
    ]
    whole = np.vstack(rows)
    np.testing.assert_array_equal(whole, images["china.jpg"][: len(whole)])
    assert len(images["china.jpg"]) - len(whole) <= 1


def test_a_folder_is_read_by_name_and_not_below(tmp_path: Path) -> None:
    expected = save(tmp_path / "b.PNG")
    save(tmp_path / "a.bmp", 1)
    save(tmp_path / "c.webp", 2)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._b.png").write_text("left by a desktop")
    (tmp_path / "below").mkdir()
    save(tmp_path / "below" / "d.png", 3)
    (tmp_path / "folder.png").mkdir()
    found = calibration.load(tmp_path)
    assert found.source == tmp_path.name
    assert [one.name for one in found.images] == ["a.bmp", "b.PNG", "c.webp"]
    assert found.images[1].image.tobytes() == expected.tobytes()


def test_the_hash_is_of_the_pixels_and_their_shape(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.png")
    same = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    same.save(tmp_path / "d.png")
    a, b, c, d = (one.sha256 for one in calibration.load(tmp_path).images)
    assert a == b
    assert len({a, c, d}) == 3


def test_pixels_are_what_the_graph_reads(tmp_path: Path) -> None:
    image = save(tmp_path / "a.png")
    (pixels,) = calibration.pixels(calibration.load(tmp_path), PREPROCESSING)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 64, 64), torch.float32)
    np.testing.assert_array_equal(pixels.numpy(), preprocess(image, PREPROCESSING))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "There is no calibration folder"),
        ("file.png", "is a file, not a folder"),
        ("empty", "has no images"),
        ("full", "has 101 images; calibration takes at most 100"),
    ],
)
def test_a_folder_that_cannot_serve_is_one_error(tmp_path: Path, name: str, words: str) -> None:
    save(tmp_path / "file.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "full").mkdir()
    for index in range(101):
        (tmp_path / "full" / f"{index}.png").touch()
    with pytest.raises(ExportError, match=words) as caught:
        calibration.load(tmp_path / name)
    assert "--calibration" in caught.value.hint


def test_all_unreadable_images_are_in_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ExportError) as caught:
        calibration.load(tmp_path)
    for name in ("cut.png", "text.jpg", "bomb.png"):
        assert name in caught.value.message
    assert "good.png" not in caught.value.message
    assert "--calibration" in caught.value.hint
    assert "--image" not in str(caught.value)
