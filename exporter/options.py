"""The command line's options, each said once: what several commands share, and the long ones."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Folder of a FastVLM checkpoint (Apple/LLaVA or Hugging Face layout)."),
]
Random = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Random weights at full size: fastvlm-0.5b, -1.5b or -7b."),
]
Seed = Annotated[int, typer.Option(help="Seed of the random weights.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="Also prove it on this image; repeat for more."),
]
Recipe = Annotated[
    str,
    typer.Option(
        help="How numbers are stored: fp32, fp16, bf16, fp8, int8, int4, lut4, lut6 or a TOML file."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Images that quantization is calibrated on."),
]
Resolution = Annotated[
    int | None, typer.Option(min=1, help="Image side in pixels; default: the checkpoint's.")
]
Positions = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Positions in the cache; default: the checkpoint's."),
]
Runs = Annotated[int, typer.Option(min=1, help="Timed runs after warm-up.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
BundlePath = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that an export wrote.")
]
Layout = Annotated[
    str | None, typer.Option(help="Core ML: the client that it is for, such as apple-app.")
]
DeploymentTarget = Annotated[
    str | None, typer.Option(help="Core ML: the oldest system, such as iOS18.")
]
Backend = Annotated[
    str | None,
    typer.Option(
        help="ExecuTorch: xnnpack (default), portable, coreml, vulkan or qnn. "
        "TensorRT: tensorrt-rtx (default) or tensorrt."
    ),
]
ExternalWeights = Annotated[
    bool | None,
    typer.Option("--external-weights", help="ExecuTorch: the weights in a file of their own."),
]
ComputeCapability = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="TensorRT: the GPUs to build engines for [80,86,89,120]."),
]
ComputeUnits = Annotated[
    list[str] | None,
    typer.Option(
        help="Core ML only: time it on all, cpu-and-ne, cpu-and-gpu or cpu-only; repeat for more."
    ),
]
Device = Annotated[
    str | None, typer.Option(help="ExecuTorch: time it on this phone, adb://SERIAL.")
]
Runner = Annotated[
    Path | None, typer.Option(help="The program to push to --device: examples/android.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads on the --device.")]
Stats = Annotated[
    Path | None, typer.Option(help="Read a log that a runner printed on a phone instead.")
]
Kit = Annotated[Path | None, typer.Option(help="Write what a phone needs to this DIR.")]


def capabilities(text: str | None) -> tuple[str, ...] | None:
    """What `--compute-capability` lists, "8.9" and "sm_89" spelled as "89"; None: not given."""
    if text is None:
        return None
    parts = (part.strip().lower().removeprefix("sm").removeprefix("_") for part in text.split(","))
    return tuple(dict.fromkeys(part.replace(".", "") for part in parts))
