"""ExecuTorch's own `MultimodalRunner` on a bundle: what an app that knows nothing of us would get.

It is given the bundle's program and tokenizer and nothing else. It runs in a process of its own,
since it aborts where it is not content; prints there what it generates, and its own report.
"""

import io
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..exporter import child
from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..exporter.scratch import ScratchFolder
from ..targets.base import Array
from ..targets.executorch_model import EXPORT_HINT, PROGRAM, WEIGHTS
from .runner_stats import RunnerStats, parse

WORKER = "fastvlm_export.validate.stock_runner_worker"
TOKENIZER = "tokenizer.json"

Part = str | Sequence[int] | Array
"""Of a prompt: a text that the runner tokenizes, token ids, or pixels [1,3,R,R]."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the runner said to one prompt."""

    pieces: tuple[str, ...]
    """The text of each new token, the end token's among them."""
    stats: RunnerStats
    """Its own report, one run for each time that it answered the prompt."""


def answers(
    bundle: Bundle,
    prompts: Sequence[Sequence[Part]],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    seconds: float = 600,
) -> list[Answer]:
    """Answer each prompt greedily, from an empty cache, `repeats` times; prompts come in parts.

    Raises ExportError where the runner fails or ends.
    """
    with ScratchFolder() as folder:
        pixels = folder / "pixels.npz"
        arrays: dict[str, Array] = {}
        job: dict[str, object] = {
            "program": str(bundle.path / PROGRAM),
            "weights": _weights(bundle),
            "tokenizer": str(bundle.path / TOKENIZER),
            "pixels": str(pixels),
            "max_new_tokens": max_new_tokens,
            "repeats": repeats,
            "prompts": [[_described(part, arrays) for part in prompt] for prompt in prompts],
        }
        np.savez(pixels, **arrays)  # type: ignore[arg-type]
        return _run(job, str(bundle.path), seconds)


def _weights(bundle: Bundle) -> str | None:
    external = bundle.manifest.artifact.get("external_weights")
    return str(bundle.path / WEIGHTS) if external else None


def _described(part: Part, arrays: dict[str, Array]) -> object:
    """A part as JSON: text, ids, or the name of an array."""
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, np.ndarray):
        name = f"image{len(arrays)}"
        # The runner takes the numbers as they lie in memory.
        arrays[name] = np.ascontiguousarray(part, dtype=np.float32)
        return {"image": name}
    return {"tokens": [int(token) for token in part]}


def _run(job: dict[str, object], name: str, seconds: float) -> list[Answer]:
    hint = f"See whether our own session runs it: fastvlm-export validate {name}"
    try:
        done = subprocess.run(  # noqa: S603 - our own module in our own interpreter
            child.command(WORKER),
            input=json.dumps(job) + "\n",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"MultimodalRunner did not answer within {seconds:.0f} s: {name}", hint
        ) from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = f"signal {-done.returncode}" if done.returncode < 0 else f"{done.returncode}"
        raise ExportError(
            f"MultimodalRunner ended with {reason} on {name}: {said[-1] if said else 'no word'}",
            hint if done.returncode > 0 else EXPORT_HINT,
        )
    return [
        Answer(pieces=tuple(json.loads(line)["pieces"]), stats=parse(json.loads(line)["printed"]))
        for line in io.StringIO(done.stdout)
    ]
