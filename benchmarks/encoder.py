"""FastVLM-0.5B's image encoder in float32: the ONNX graph against PyTorch, OpenVINO and the limit.

    python benchmarks/encoder.py                        256, 512 and 1024 px
    python benchmarks/encoder.py --size 1024 --rounds 9

The limit is one matrix product of as many floating-point operations as the encoder has, by PyTorch
or by NumPy, whichever was faster in that round. Weights are random, and every PyTorch peer runs
the reparameterized tower, so that only the runtimes differ. Each round times all subjects one
after the other, in turn another one first; medians are shown.
"""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import openvino
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.config import preset
from fastvlm_export.exporter.graphs import Graph
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.targets import onnx_files, onnx_lowering
from fastvlm_export.targets.base import Array, available_cores
from fastvlm_export.targets.onnx_session import load_graph
from fastvlm_export.validate.machine import describe

PRESET = "fastvlm-0.5b"
REST = 0.3  # seconds between subjects, so that one's idle threads stop spinning
LIMIT = 1e-4  # of the largest feature: what is timed must be the same function
PRODUCTS = ("Matrix product, NumPy", "Matrix product, PyTorch")

Subject = Callable[[], Any]


def encoder() -> FastVLM:
    """The tower and projector of the preset, folded; a decoder too small to matter."""
    config = preset(PRESET)
    tower = dataclasses.replace(config.tower, head_width=0)
    decoder = dataclasses.replace(config.decoder, vocab_size=8, layers=1, intermediate_size=8)
    torch.manual_seed(0)
    model = FastVLM(dataclasses.replace(config, tower=tower, decoder=decoder)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # else its initial 1e-5 hides the blocks from the check
                parameter.fill_(0.5)
    return reparameterize(model).model


def matrix_products(operations: float) -> dict[str, Subject]:
    """A square product of `operations`, 2 per multiply-add, in each library."""
    side = round((operations / 2) ** (1 / 3))
    left, right, out = torch.rand(side, side), torch.rand(side, side), torch.empty(side, side)
    numpy, torchs = PRODUCTS
    return {
        numpy: lambda: np.matmul(left.numpy(), right.numpy(), out=out.numpy()),
        torchs: lambda: torch.mm(left, right, out=out),
    }


def subjects(model: FastVLM, graph: Graph, pixels: Array, folder: Path) -> dict[str, Subject]:
    """Name -> one encoding of `pixels`; each returns the features."""
    path = folder / f"vision_{pixels.shape[-1]}.onnx"
    program = graphs.export_program(graph)
    names = onnx_lowering.interface("vision", program, model.config.decoder)
    onnx_files.save(onnx_lowering.to_onnx(program, names), path)
    ours = load_graph(path)
    vino = openvino.Core().compile_model(
        path,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": available_cores(),
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        },
    )
    return {
        "ONNX Runtime (ours)": lambda: ours.run(None, {"pixel_values": pixels})[0],
        "OpenVINO, our graph": lambda: vino(pixels)[0],
        "PyTorch channels-last": _eager(graph.module, pixels, torch.channels_last),
        "PyTorch eager": _eager(graph.module, pixels, torch.contiguous_format),
    }


def _eager(module: nn.Module, pixels: Array, layout: torch.memory_format) -> Subject:
    placed = copy.deepcopy(module).to(memory_format=layout)  # type: ignore[call-overload]
    tensor = torch.from_numpy(pixels).contiguous(memory_format=layout)

    def run() -> Array:
        with torch.inference_mode():
            out: Array = placed(tensor).numpy()
        return out

    return run


def measure(runs: dict[str, Subject], rounds: int) -> dict[str, list[float]]:
    """Seconds of each subject in each round, after one warm-up of each."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(-1, rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(REST)
            started = time.perf_counter()
            runs[name]()
            if index >= 0:
                found[name].append(time.perf_counter() - started)
    return found


def at_size(model: FastVLM, size: int, rounds: int, folder: Path) -> Table:
    """Check that all subjects agree, time them at `size` pixels, and make their table."""
    pixels = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    graph = graphs.build(model, resolution=size, context=8, image_token_id=0)["vision"]
    runs = subjects(model, graph, pixels, folder)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter knows no fused attention
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        expected = graph.module(torch.from_numpy(pixels)).numpy()
    worst = {
        name: float(np.abs(run() - expected).max() / np.abs(expected).max())
        for name, run in runs.items()
    }
    for name, value in worst.items():
        if not value <= LIMIT:
            raise SystemExit(f"{name} differs from PyTorch by {value:.1e}, more than {LIMIT:.0e}")
    operations = float(counter.get_total_flops())
    seconds = measure({**matrix_products(operations), **runs}, rounds)
    return table(size, operations, seconds, worst)


def table(
    size: int, operations: float, seconds: dict[str, list[float]], worst: dict[str, float]
) -> Table:
    """Medians, and the median of each round's ratio to the faster matrix product of that round."""
    out = Table(title=f"Image encoder, {size} px, float32: {operations / 1e9:.1f} GFLOP")
    for heading in ("", "median ms", "GFLOP/s", "of the matrix product", "largest difference"):
        out.add_column(heading, justify="right" if heading else "left")
    limit = np.min([seconds[name] for name in PRODUCTS], axis=0)
    for name, values in seconds.items():
        middle = float(np.median(values))
        out.add_row(
            name,
            f"{middle * 1e3:.0f}",
            f"{operations / middle / 1e9:.0f}",
            f"{np.median(np.array(values) / limit):.2f}x",
            f"{worst[name]:.0e}" if name in worst else "",
        )
    return out


def main(
    size: Annotated[list[int] | None, typer.Option(help="Image side in pixels.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds after warm-up.")] = 7,
) -> None:
    """Print one table for each size."""
    torch.set_num_threads(available_cores())
    console = Console(width=100)
    machine = describe()
    console.print(
        f"{machine.cpu}, {available_cores()} threads, load {machine.load:.1f} before the start"
    )
    model = encoder()
    with tempfile.TemporaryDirectory() as folder:
        for each in size or [256, 512, 1024]:
            console.print(at_size(model, each, rounds, Path(folder)))


if __name__ == "__main__":
    typer.run(main)
