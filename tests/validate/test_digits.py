import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from fastvlm_export.validate import digits
from fastvlm_export.validate.digits import Kind

EVALUATION_SHA256 = "1fb9d9c27ab74674d1034516bbcd9ea8e7528327301b82bf4cf0d607210a7843"


def test_split_is_stratified_and_disjoint() -> None:
    train, held_out = digits.training_scans(), digits.held_out_scans()
    assert len(train) == 1437
    assert len(held_out) == digits.HELD_OUT_DIGITS
    assert set(Counter(scan.label for scan in held_out).values()) == {36}
    trained = {scan.pixels.tobytes() for scan in train}
    assert not [scan for scan in held_out if scan.pixels.tobytes() in trained]


def test_evaluation_set_never_changes() -> None:
    """The published accuracies are about exactly these pixels and answers."""
    digest = hashlib.sha256()
    for question in digits.evaluation_set(300):
        digest.update(np.asarray(question.image).tobytes())
        digest.update(f"{question.text}|{question.answer}\n".encode())
    assert digest.hexdigest() == EVALUATION_SHA256


def test_evaluation_set_asks_the_three_kinds_equally() -> None:
    questions = digits.evaluation_set(300)
    assert Counter(question.kind for question in questions) == dict.fromkeys(Kind, 100)
    assert len({question.image_index for question in questions}) == 100
    for question in questions:
        assert question.image.size == (digits.RESOLUTION, digits.RESOLUTION)
        assert question.text == digits.QUESTIONS[question.kind]
    lengths = Counter(len(q.answer) for q in questions if q.kind is Kind.NUMBER)
    assert sorted(lengths) == [1, 2, 3, 4]


def test_a_longer_set_starts_with_the_shorter_one() -> None:
    short, long = digits.evaluation_set(9), digits.evaluation_set(30)
    assert [q.answer for q in short] == [q.answer for q in long[:9]]


@pytest.mark.parametrize("n", [0, 1, 100, -3])
def test_a_number_that_is_no_multiple_of_three_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="multiple of three"):
        digits.evaluation_set(n)


@pytest.mark.parametrize("bent", [False, True])
def test_digits_stand_where_the_scene_says(bent: bool) -> None:
    rng = random.Random(3)  # noqa: S311
    for _ in range(20):
        scans = rng.sample(digits.training_scans(), rng.randint(1, digits.MAX_DIGITS))
        augmentation = digits.Augmentation() if bent else None
        scene = digits.compose(rng, scans, augmentation=augmentation)
        assert scene.digits == "".join(str(scan.label) for scan in scans)
        assert [x for x, _ in scene.centres] == sorted(x for x, _ in scene.centres)
        paper = np.median(scene.pixels, axis=(0, 1))
        ink = np.abs(scene.pixels - paper).sum(axis=2) > 120
        near = np.zeros_like(ink)
        for x, y in scene.centres:
            window = ink[int(y) - 30 : int(y) + 31, max(int(x) - 30, 0) : int(x) + 31]
            assert window.any()
            near[max(int(y) - 30, 0) : int(y) + 31, max(int(x) - 30, 0) : int(x) + 31] = True
        assert not ink[~near].any()


def test_answers_and_caption() -> None:
    rng = random.Random(0)  # noqa: S311
    zeros = [scan for scan in digits.held_out_scans() if scan.label == 0]
    scene = digits.compose(rng, zeros[:2])
    assert scene.answer(Kind.NUMBER) == "00"
    assert scene.answer(Kind.COUNT) == "2"
    assert scene.answer(Kind.COLOUR) == scene.colour
    assert scene.caption().endswith(f"{scene.colour} image with 2 digits: 00.")


def test_a_row_too_long_for_the_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        digits.compose(random.Random(0), digits.training_scans()[:4], width=128)  # noqa: S311
