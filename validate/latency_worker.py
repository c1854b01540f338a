"""The process that `latency.measure` times one backend in: JSON lines in, JSON lines out.

The first line is the job; then {"do": "load" | "round" | "finish"}. Run by `latency`, not by hand.
"""

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import psutil

from .. import targets
from ..exporter.bundle import MANIFEST, Bundle, Manifest
from ..exporter.errors import ExportError
from ..exporter.preprocess import preprocess, read_image
from ..exporter.tokenizer import read_tokenizer
from ..quantize.quiet import quiet_import
from ..targets import TargetName, tensorrt_kernels
from ..targets.base import Session
from ..targets.coreml_session import DEFAULT_UNITS, forget_compiled
from ..targets.generation import splice
from ..targets.tensorrt_plan import read_plan
from .latency import DECODE, Backend, Part, is_random
from .machine import peak_memory, reset_peak_memory
from .sessions import open_session

Load = Callable[[], Callable[[], Session]]
"""Timed: read and prepare the weights. What it returns is not timed: the session's last touches."""


@runtime_checkable
class DeviceTimed(Protocol):
    """A session that knows how long its GPU computed."""

    def take_device_seconds(self) -> float:
        """Seconds on the GPU's clock since the last call."""
        ...


class Worker:
    """One backend on one bundle's contract."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        folder = Path(job["bundle"])
        # The caller has checked the hashes; reading every byte here would warm the page cache.
        manifest = Manifest.from_json((folder / MANIFEST).read_text("utf-8"))
        self.bundle = Bundle(path=folder, manifest=manifest)
        self.tokenizer = read_tokenizer(folder)
        self.is_bundle = job["backend"] == Backend.BUNDLE
        self.session: Session | None = None
        self.peak_of_load = 0

    def load(self, *, cold: bool, keep: bool) -> dict[str, Any]:
        """Open the backend: seconds, what a cold number is worth, and the setting.

        Without `keep` the process is there to time the loading alone.
        """
        files = self._files()
        size = sum(path.stat().st_size for path in files)
        load, setting = self._bundle() if self.is_bundle else self._pytorch()
        compiles = cold and self.is_bundle and self._forget_compiled()
        dropped = cold and drop_from_page_cache(files)
        read = bytes_read()
        start = time.perf_counter()
        finish = load()
        seconds = time.perf_counter() - start
        note = _note(dropped, size, bytes_read() - read, compiles=compiles) if cold else ""
        if keep and not self.is_bundle:
            # The proof that comes with folding must not count as memory that eager needs.
            self.peak_of_load = peak_memory()
            self.session = finish()
            del finish, load
            gc.collect()
            reset_peak_memory()
        elif keep:
            self.session = finish()
            setting += f"; {how}" if (how := getattr(self.session, "how", "")) else ""
        return {"seconds": seconds, "note": note, "setting": setting}

    def round(self) -> dict[str, Any]:
        """One question timed part by part, then the tokens after the first. In seconds."""
        session, job = self.session, self.job
        if session is None:
            raise RuntimeError("a round was asked for before the load")
        manifest, image = self.bundle.manifest, Path(job["image"])
        lap = _device_laps(session)
        ids = np.asarray(job["prompt_ids"], dtype=np.int64)
        marks = [time.perf_counter()]
        pixels = preprocess(read_image(image), manifest.preprocessing)
        marks.append(time.perf_counter())
        features = session.encode_image(pixels)
        marks.append(time.perf_counter())
        on_device = lap(Part.ENCODE)
        session.reset()
        text = session.embed(np.where(ids == manifest.image_token_id, 0, ids)[None])
        logits = session.decode(splice(job["prompt_ids"], manifest.image_token_id, text, features))
        marks.append(time.perf_counter())
        on_device |= lap(Part.PREFILL)
        token = int(logits[0].argmax())
        word = self.tokenizer.decode([token])
        marks.append(time.perf_counter())
        for _ in range(job["tokens"]):
            logits = session.decode(session.embed(np.array([[token]], dtype=np.int64)))
            token = int(logits[0].argmax())
        decode = time.perf_counter() - marks[-1]
        on_device |= lap(DECODE)
        spent = np.diff(marks)
        parts = {part.value: float(seconds) for part, seconds in zip(Part, spent, strict=True)}
        total = marks[-1] - marks[0]
        return {**parts, "ttft": total, "decode": decode, "text": word, "on_device": on_device}

    def finish(self) -> dict[str, Any]:
        """The most memory that loading and running took."""
        return {"peak_memory_bytes": max(self.peak_of_load, peak_memory())}

    def _files(self) -> list[Path]:
        """What loading reads."""
        if self.is_bundle:
            return [self.bundle.path / name for name in self.bundle.manifest.files]
        checkpoint: str = self.job["checkpoint"]
        if is_random(checkpoint):
            return []
        folder = Path(checkpoint)
        if checkpoint == "bundled":
            from ..exporter.checkpoint import BUNDLED_FOLDER  # noqa: PLC0415 - imports torch

            folder = BUNDLED_FOLDER
        return [path for path in folder.iterdir() if path.is_file()]

    def _bundle(self) -> tuple[Load, str]:
        target = targets.get(self.bundle.manifest.target)
        units: str = self.job["compute_units"]
        with quiet_import():
            for package in target.RUNTIME_PACKAGES:
                importlib.import_module(package)  # here, so that it is not timed

        def load() -> Callable[[], Session]:
            session = open_session(self.bundle, compute_units=units or None)
            return lambda: session

        versions = target.availability().versions
        runtime = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
        backend = self.bundle.manifest.artifact.get("backend")
        on = f", backend {backend}" if backend else ""
        on += f", compute units {units}" if units else ""
        return load, f"{self.bundle.manifest.recipe['name']}; {runtime}{on}"

    def _forget_compiled(self) -> bool:
        """Have compiled anew what Core ML or TensorRT for RTX compiled; False where nothing is."""
        if self.bundle.manifest.target == TargetName.TENSORRT:
            return tensorrt_kernels.forget(self.bundle, read_plan(self.bundle.path))
        packages = list(self.bundle.path.glob("*.mlpackage"))
        for package in packages:
            forget_compiled(package, self.job["compute_units"] or DEFAULT_UNITS)
        return bool(packages)

    def _pytorch(self) -> tuple[Load, str]:
        import torch  # noqa: PLC0415 - the bundle's own process must not hold it

        from ..exporter import checkpoint as checkpoints  # noqa: PLC0415
        from ..exporter.reparameterize import reparameterize  # noqa: PLC0415
        from ..targets.eager import EagerSession  # noqa: PLC0415

        torch.set_num_threads(self.job["threads"])
        name: str = self.job["checkpoint"]
        channels_last: bool = self.job["channels_last"]
        folded: bool = self.job["folded"]
        context = self.bundle.manifest.context

        def load() -> Callable[[], Session]:
            if is_random(name):
                _, preset, seed = name.split(":")
                model = checkpoints.random(preset, int(seed)).model()
            else:
                found = checkpoints.bundled() if name == "bundled" else checkpoints.load(Path(name))
                model = found.model()
            return lambda: EagerSession(
                reparameterize(model).model if folded else model,
                context,
                channels_last=channels_last,
            )

        layout = "channels-last" if channels_last else "contiguous"
        form = "reparameterized" if folded else "not reparameterized"
        setting = (
            f"torch {torch.__version__} eager, float32, {form}, {layout}, inference_mode, "
            f"key/value cache, {torch.get_num_threads()} threads"
        )
        return load, setting


def _device_laps(session: Session) -> Callable[[str], dict[str, float]]:
    """Called at the end of a part: its name -> what the GPU computed in it, if anything tells."""
    if not isinstance(session, DeviceTimed):
        return lambda name: {}
    take = session.take_device_seconds
    take()  # what came before the first part
    return lambda name: {str(name): take()}


def drop_from_page_cache(files: Iterable[Path]) -> bool:
    """Ask the system to forget these files' contents; False where there is no way to ask."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages that were not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(descriptor)
    return True


def bytes_read() -> int:
    """Bytes that this process had the disk read; 0 where the system does not count them."""
    process = psutil.Process()
    try:
        return int(process.io_counters().read_bytes) if hasattr(process, "io_counters") else 0
    except (psutil.Error, OSError):
        return 0


def _note(dropped: bool, size: int, read: int, *, compiles: bool = False) -> str:
    """What a cold number is worth: packages must have been compiled, or the disk read, for it."""
    if compiles:
        return "cold: compiled anew; what the system keeps besides cannot be dropped"
    if not dropped:
        return "not cold: this system cannot drop files from the page cache"
    if read < size // 2:
        return (
            f"perhaps not cold: {read / 1e6:.1f} of {size / 1e6:.1f} MB were seen to come from disk"
        )
    return f"cold: {read / 1e6:.1f} MB came from disk"


def main() -> None:
    """Answer requests until stdin ends."""
    # Libraries print to file descriptor 1; the answers go to a copy of it that only we know.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            if worker is None:
                worker = Worker(request)
                continue
            answer = _answer(worker, request)
        except ExportError as error:
            answer = {"error": error.message, "hint": error.hint}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if "error" in answer:
            return


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "load":
            return worker.load(cold=request["cold"], keep=request["keep"])
        case "round":
            return worker.round()
        case _:
            return worker.finish()


if __name__ == "__main__":
    main()
