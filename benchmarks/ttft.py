"""Time to first token at FastVLM-0.5B's size: the ONNX bundle against PyTorch eager. One table.

    python benchmarks/ttft.py --out out/fastvlm-0.5b     export first (2.5 GB), then time
    python benchmarks/ttft.py --bundle out/fastvlm-0.5b  time what is there

Weights are random: time does not depend on them. PyTorch runs the tower as checkpoints store it,
reparameterized, and reparameterized in channels-last, on as many threads, with a key/value cache;
every round times all of them one after the other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastvlm_export.exporter.bundle import open_bundle
from fastvlm_export.exporter.pipeline import ExportRequest, export
from fastvlm_export.exporter.prompt import prompt_ids
from fastvlm_export.exporter.samples import samples
from fastvlm_export.exporter.source import SourceRequest, recorded_source
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.validate import latency, terminal
from fastvlm_export.validate.latency import Backend, Plan, Subject
from fastvlm_export.validate.proof import pytorch_peer

PRESET, SEED = "fastvlm-0.5b", 0
QUESTION = "What are these?"


def main(
    bundle: Annotated[Path | None, typer.Option(help="An export of the same random model.")] = None,
    out: Annotated[Path, typer.Option(help="Where to export to.")] = Path("out/fastvlm-0.5b"),
    resolution: Annotated[int, typer.Option(help="Image side in pixels, for an export.")] = 1024,
    runs: Annotated[int, typer.Option(help="Rounds after warm-up.")] = 10,
) -> None:
    """Print one table: each part of TTFT for the bundle and its peers."""
    messages = Console(stderr=True)
    if bundle is None:
        messages.print(f"Exporting {PRESET} with random weights to {out}")
        source = SourceRequest(random=PRESET, seed=SEED)
        bundle = export(ExportRequest(source=source, out=out, resolution=resolution))[0].path
    opened = open_bundle(bundle)
    manifest = opened.manifest
    eager = replace(pytorch_peer(opened, recorded_source(manifest)), name="PyTorch eager")
    peers = [
        replace(eager, name="PyTorch as stored", folded=False),
        eager,
        replace(eager, name="PyTorch channels-last", channels_last=True),
    ]
    ours = Subject(name=manifest.target, backend=Backend.BUNDLE, bundle=bundle)
    tokens = prompt_ids(
        read_tokenizer(bundle), QUESTION, manifest.image_token_id, manifest.image_tokens
    )
    result = latency.measure(
        [ours, *peers],
        samples(())[-1].image,
        tokens,
        Plan(warmup=1, runs=runs, seconds=600.0, loads=1),
        messages.print,
    )
    Console(width=140).print(terminal.latency(result))


if __name__ == "__main__":
    typer.run(main)
