"""FastVLM-0.5B's image encoder through ExecuTorch (XNNPACK) against ONNX Runtime, same threads.

    python benchmarks/executorch_encoder.py                         256 and 1024 px, fp32 and int8
    python benchmarks/executorch_encoder.py --size 256 --recipe fp32

Weights are random. Each round runs both one after the other, in turn the other one first. Wall time
is the least of all rounds. Processor time is that of all threads, with ONNX Runtime's idle threads
asleep: on a machine that is busy with other things it is the steadier of the two.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import typer
from encoder import encoder
from executorch.extension.pybindings import portable_lib
from rich.console import Console
from rich.table import Table
from torch.export import ExportedProgram

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.quantize.activations import quantize_vision
from fastvlm_export.quantize.recipes import RECIPES, Recipe
from fastvlm_export.targets import (
    executorch_backends,
    executorch_lowering,
    executorch_recipes,
    executorch_vision,
    onnx_files,
    onnx_lowering,
)
from fastvlm_export.targets.base import Array, available_cores
from fastvlm_export.targets.executorch_model import VISION, Backend
from fastvlm_export.validate.machine import describe

REST = 0.3  # seconds between runs
LIMIT = {"fp32": 1e-4, "int8": 0.5}  # of the largest feature: both must encode the same image
ALLOWED = 1.5  # times ONNX Runtime's time

Subject = Callable[[], Array]
"""One encoding."""


def traced(model: FastVLM, recipe: Recipe, pixels: Array) -> ExportedProgram:
    """The vision program under a recipe, calibrated on the image that is timed."""
    size = pixels.shape[-1]
    graph = graphs.build(model, resolution=size, context=8, image_token_id=0)["vision"]
    if recipe.vision.bits is None:
        return graphs.export_program(graph)
    return quantize_vision(graph, recipe, [torch.from_numpy(pixels)])


def executorch(program: ExportedProgram, pixels: Array, path: Path, threads: int) -> Subject:
    """Lower for XNNPACK and load; says how long that took."""
    started = time.process_time()
    method = executorch_vision.vision_method(program)
    partitioners = {VISION: executorch_backends.partitioners(Backend.XNNPACK, VISION)}
    path.write_bytes(executorch_lowering.lower({VISION: method}, partitioners, {}).pte)
    seconds = time.process_time() - started
    typer.echo(f"lowered in {seconds:.0f} s of processor time, {path.stat().st_size / 1e6:.0f} MB")
    portable_lib._unsafe_reset_threadpool(threads)
    module = portable_lib._load_for_executorch(str(path))
    tensor = torch.from_numpy(pixels)

    def run() -> Array:
        found: Array = module.run_method(VISION, [tensor])[0].numpy()
        return found

    return run


def onnx(
    model: FastVLM, program: ExportedProgram, pixels: Array, path: Path, threads: int
) -> Subject:
    """Our ONNX graph, its threads asleep while they wait."""
    names = onnx_lowering.interface("vision", program, model.config.decoder)
    onnx_files.save(onnx_lowering.to_onnx(program, names), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run() -> Array:
        found: Array = session.run(None, {"pixel_values": pixels})[0]
        return found

    return run


def measure(subjects: list[Subject], rounds: int) -> tuple[list[float], list[float]]:
    """The least wall seconds and the least processor seconds of each subject."""
    wall, used = ([float("inf")] * len(subjects) for _ in range(2))
    for index in range(rounds):
        order = list(range(len(subjects)))
        for which in order[index % 2 :] + order[: index % 2]:
            time.sleep(REST)
            started, before = time.perf_counter(), time.process_time()
            subjects[which]()
            used[which] = min(used[which], time.process_time() - before)
            wall[which] = min(wall[which], time.perf_counter() - started)
    return wall, used


def row(model: FastVLM, size: int, name: str, rounds: int, threads: int, folder: Path) -> list[str]:
    """One recipe at one size."""
    pixels = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    ours = executorch_recipes.adapt(RECIPES[name], Backend.XNNPACK)
    program = traced(model, ours, pixels)
    first = executorch(program, pixels, folder / "model.pte", threads)
    theirs = traced(model, RECIPES[name], pixels)
    second = onnx(model, theirs, pixels, folder / "vision.onnx", threads)
    expected = second()
    worst = float(np.abs(first() - expected).max() / np.abs(expected).max())
    if not worst <= LIMIT[name]:
        raise SystemExit(f"{name}, {size} px: they differ by {worst:.1e}, more than {LIMIT[name]}")
    wall, used = measure([first, second], rounds)
    del program, theirs
    gc.collect()
    ratio = wall[0] / wall[1]
    return [
        str(size),
        name,
        f"{wall[0] * 1e3:.0f}",
        f"{wall[1] * 1e3:.0f}",
        f"{ratio:.2f}x" + ("" if ratio <= ALLOWED else " > 1.5x"),
        f"{used[0] / used[1]:.2f}x",
        f"{worst:.0e}",
    ]


def main(
    size: Annotated[list[int] | None, typer.Option(help="Image side in pixels.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="fp32 or int8.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds after a first run.")] = 7,
) -> None:
    """Print one table."""
    threads, machine = available_cores(), describe()
    torch.set_num_threads(threads)
    out = Table(title=f"Image encoder, ExecuTorch against ONNX Runtime, {threads} threads each")
    for heading in ("px", "recipe", "ExecuTorch ms", "ONNX Runtime ms", "wall", "processor", "off"):
        out.add_column(heading, justify="left" if heading == "recipe" else "right")
    model = encoder()
    for side in size or [256, 1024]:
        for name in recipe or ["fp32", "int8"]:
            with tempfile.TemporaryDirectory() as folder:
                out.add_row(*row(model, side, name, rounds, threads, Path(folder)))
    console = Console(width=100)
    console.print(f"{machine.cpu}, load {machine.load:.1f} before the start")
    console.print(out)


if __name__ == "__main__":
    typer.run(main)
