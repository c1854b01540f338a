"""Changes that do not matter: whatever gate fails under one of them rolls dice.

Each is a name and a function that proves the same bundle, or one that is just as right, against a
reference that is just as right.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from fastvlm_export.exporter.bundle import Bundle
from fastvlm_export.exporter.samples import Sample
from fastvlm_export.quantize.apply import needs_calibration
from fastvlm_export.targets.base import Array, Session, TokenIds
from fastvlm_export.validate import digits, proof
from fastvlm_export.validate.proof import Baseline, Original

from .cells import Effort, Prepared, prepare
from .judge import Judged, all_gates

PHOTOGRAPHS = ("flower.jpg", "china.jpg")
ULP_SEEDS = 8
OPTIMIZATIONS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
}


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """What is changed, and how the gates judge then."""

    name: str
    judge: Callable[[], Judged]


def disturbances(
    cell: Prepared, work: Path, effort: Effort, pythons: Sequence[Path] = ()
) -> Iterator[Disturbance]:
    """All of a target and recipe, the cheap ones first.

    `work` keeps what takes long to make; `pythons` are interpreters with other versions.
    """
    for threads in (2, 4):
        yield _proved(cell, f"{threads} threads in the runtime", _runtime_threads(threads))
    if cell.target in ("onnx", "tensorrt"):
        for level, option in OPTIMIZATIONS.items():
            yield _proved(cell, f"graph optimizations {level}", _optimized(option))
    for seed in range(ULP_SEEDS):
        yield _proved(cell, f"inputs moved by one ulp, seed {seed}", _moved(seed))
    for threads in (2, 4):
        yield _examined(cell, f"{threads} threads in the reference", _torch_threads(threads))
    yield _examined(cell, "the reference without oneDNN", _without_onednn)
    yield _examined(cell, "denormals as zero in the reference", _without_denormals)
    count = len(cell.images)
    shuffled = random.Random(0).sample(range(count), count)  # noqa: S311 - an order
    for name, order in (("reversed", range(count)[::-1]), ("shuffled", shuffled)):
        yield Disturbance(
            name=f"images {name}", judge=functools.partial(_in_order, cell, list(order))
        )
    for name, images in other_images(cell.images).items():
        again = functools.partial(_on_images, cell, name, images, work, effort.steps)
        yield Disturbance(name=name, judge=again)
    if needs_calibration(cell.reference.recipe):
        for name, pictures in calibrations().items():
            anew = functools.partial(_calibrated, cell, name, pictures, work, effort)
            yield Disturbance(name=f"calibrated on {name}", judge=anew)
    for python in pythons:
        elsewhere = functools.partial(_validated_by, python, cell, effort)
        yield Disturbance(name=f"the versions of {python.parent.parent.name}", judge=elsewhere)


def _proved(
    cell: Prepared, name: str, around: Callable[[], AbstractContextManager[Any]]
) -> Disturbance:
    """The artifact runs otherwise, against the same baseline."""

    def judge() -> Judged:
        with around():
            return all_gates(cell.baseline, cell.bundle, cell.images)

    return Disturbance(name=name, judge=judge)


def _examined(
    cell: Prepared, name: str, around: Callable[[], AbstractContextManager[Any]]
) -> Disturbance:
    """The reference runs otherwise: a baseline of its own."""

    def judge() -> Judged:
        with around():
            baseline = cell.examined()
        return all_gates(baseline, cell.bundle, cell.images)

    return Disturbance(name=name, judge=judge)


@contextlib.contextmanager
def _with_torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_threads(threads: int) -> Callable[[], AbstractContextManager[Any]]:
    return functools.partial(_with_torch_threads, threads)


def _runtime_threads(threads: int) -> Callable[[], AbstractContextManager[Any]]:
    """ONNX Runtime's and ExecuTorch's pools, and torch's for the interpreters."""

    def around() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(_with_torch_threads(threads))
        for module in ("onnx_session", "executorch_session"):
            with contextlib.suppress(ImportError):
                stack.enter_context(
                    mock.patch(f"fastvlm_export.targets.{module}.available_cores", lambda: threads)
                )
        return stack

    return around


def _optimized(level: str) -> Callable[[], AbstractContextManager[Any]]:
    """ONNX Runtime leaves out some of its own rewrites."""

    def around() -> AbstractContextManager[Any]:
        import onnxruntime as ort  # noqa: PLC0415 - of two targets only

        from fastvlm_export.targets import onnx_exact, onnx_session  # noqa: PLC0415

        made = onnx_session.session_options

        def options(threads: int | None) -> Any:
            found = made(threads)
            found.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
            return found

        stack = ExitStack()
        for module in (onnx_session, onnx_exact):
            stack.enter_context(mock.patch.object(module, "session_options", options))
        return stack

    return around


class _Moved:
    """A session whose inputs have each value moved to one of its neighbours, or left."""

    def __init__(self, session: Session, seed: int) -> None:
        self._session, self._random = session, np.random.default_rng(seed)

    def _move(self, x: Array) -> Array:
        sides = np.float32(-np.inf), x, np.float32(np.inf)
        found: Array = np.nextafter(x, np.choose(self._random.integers(0, 3, x.shape), sides))
        return found

    def encode_image(self, pixels: Array) -> Array:
        """Of pixels that are moved."""
        return self._session.encode_image(self._move(pixels))

    def embed(self, input_ids: TokenIds) -> Array:
        """Ids have no neighbours."""
        return self._session.embed(input_ids)

    def decode(self, inputs_embeds: Array) -> Array:
        """Of embeddings that are moved."""
        return self._session.decode(self._move(inputs_embeds))

    def reset(self) -> None:
        """Empty the cache."""
        self._session.reset()


def _moved(seed: int) -> Callable[[], AbstractContextManager[Any]]:
    opened = proof.open_session

    def open_session(bundle: Bundle, **options: Any) -> Session:
        return _Moved(opened(bundle, **options), seed)

    return lambda: mock.patch.object(proof, "open_session", open_session)


def _without_onednn() -> AbstractContextManager[Any]:
    """PyTorch's own convolutions and matrix products."""
    return torch.backends.mkldnn.flags(enabled=False)


@contextlib.contextmanager
def _without_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _in_order(cell: Prepared, order: Sequence[int]) -> Judged:
    """The same images in another order: another one is compared without rounding."""
    recordings = tuple(cell.original.recordings[i] for i in order)
    baseline = cell.examined(replace(cell.original, recordings=recordings, answers=None))
    return all_gates(baseline, cell.bundle, [cell.images[i] for i in order])


def _on_images(
    cell: Prepared, name: str, images: Sequence[Sample], work: Path, steps: int
) -> Judged:
    baseline = cell.examined(_original(cell, name, images, work, steps))
    return all_gates(baseline, cell.bundle, images)


def _original(
    cell: Prepared, name: str, images: Sequence[Sample], work: Path, steps: int
) -> Original:
    """What the checkpoint says of the images; every cell of an experiment asks for the same."""
    import pickle  # noqa: PLC0415 - here alone

    path = work / "originals" / f"{name.replace(' ', '-')}-{steps}.pickle"
    if path.is_file():
        found: Original = pickle.loads(path.read_bytes())  # noqa: S301 - as above
        return found
    found = cell.original_on(images, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{random.SystemRandom().getrandbits(32)}")
    partial.write_bytes(pickle.dumps(found))
    partial.replace(path)
    return found


def other_images(usual: Sequence[Sample]) -> dict[str, tuple[Sample, ...]]:
    """Sets of images, or of questions about the usual ones, that a proof could be made on."""
    photographs = {name: Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS}

    def sample(name: str, image: Image.Image, question: str) -> Sample:
        return Sample(name=name, image=image.convert("RGB"), question=question)

    crops, flips = [], []
    for name, image in photographs.items():
        width, height = image.size
        for part, box in {
            "left": (0, 0, width // 2, height),
            "middle": (width // 4, height // 4, 3 * width // 4, 3 * height // 4),
        }.items():
            crops.append(sample(f"{name} {part}", image.crop(box), "What is in this picture?"))
        flips.append(sample(f"{name} mirrored", ImageOps.mirror(image), "Describe this image."))
        flips.append(sample(f"{name} upside down", ImageOps.flip(image), "Is this indoors?"))
    canvases = [
        sample(f"canvas {number}", question.image, question.text)
        for number, question in enumerate(digits.evaluation_set(300)[90:290:40])
    ]
    questions = ("Which colours do you see?", "Read the number.", "Is there a person?")
    asked = tuple(
        replace(one, question=questions[number % len(questions)])
        for number, one in enumerate(usual)
    )
    other = tuple(replace(one, question="How many digits are there?") for one in usual)
    return {
        "crops of photographs": tuple(crops),
        "mirrored photographs": tuple(flips),
        "other canvases": tuple(canvases),
        "other questions": asked,
        "one question for all": other,
    }


def calibrations() -> dict[str, tuple[Image.Image, ...]]:
    """Pictures to calibrate on in the place of those that come with the package."""
    photographs = [Image.fromarray(load_sample_image(name)) for name in PHOTOGRAPHS]
    canvases = [question.image for question in digits.evaluation_set(300)[::25]]
    mirrored = [ImageOps.mirror(image) for image in photographs]
    return {
        "mirrored photographs and canvases": (*mirrored, *canvases),
        "canvases and one photograph": (photographs[1], *canvases[::2]),
    }


def _validated_by(python: Path, cell: Prepared, effort: Effort) -> Judged:
    """`fastvlm-export validate` on a copy, in an interpreter with other versions of libraries."""
    program = (
        "from fastvlm_export.exporter.cli import main; from fastvlm_export.validate import proof; "
        f"proof.QUESTIONS = {effort.questions}; proof.STEPS = {effort.steps}; main()"
    )
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(cell.bundle.path, Path(folder) / "bundle")
        done = subprocess.run(  # noqa: S603 - the interpreter that the caller names
            [python, "-c", program, "validate", copy, "--json"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
    if done.returncode not in (0, 1):
        return Judged(failed={"open": done.stderr.strip()[-300:]})
    report = json.loads(done.stdout)
    return Judged(failed={} if report["passed"] else {"validate": report["verdict"]})


def _calibrated(
    cell: Prepared, name: str, pictures: Sequence[Image.Image], work: Path, effort: Effort
) -> Judged:
    """Another export: its own recipe's numbers, its own reference, its own bundle."""
    folder = work / "calibration" / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.convert("RGB").save(folder / f"{number:02d}.png")
    out = work / f"{cell.target}-{cell.recipe}-on-{name.replace(' ', '-')}"
    other = prepare(cell.target, cell.recipe, out, effort, folder)
    baseline: Baseline = other.baseline
    return all_gates(baseline, other.bundle, other.images)
