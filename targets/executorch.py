"""ExecuTorch: one program that the stock `MultimodalRunner` runs, on phones, Macs and servers.

Its methods are `vision_encoder`, `token_embedding` and `text_decoder`, the cache inside as mutable
buffers; methods without inputs tell a client the sizes and end tokens. Every operator is one that
the stock runtime registers by itself.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..exporter.bundle import MANIFEST, Bundle
from ..exporter.errors import ExportError
from ..exporter.spec import ExportSpec
from ..exporter.versions import version_of
from ..quantize.recipes import Recipe
from . import client_files, executorch_backends, executorch_recipes
from .base import DEFAULTS, Artifact, Availability, Options, Session, Statement, foreign_options
from .executorch_model import DECODER, EMBEDDING, PROGRAM, VISION, WEIGHTS, Backend

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from .executorch_lowering import Lowered

PACKAGE = "executorch"
RUNTIME_PACKAGES = ("torch", "executorch.extension.pybindings._C")
"""In this order: the runtime is linked against torch's libraries."""
REMEDY = "pip install 'fastvlm-export[executorch]'"


def availability() -> Availability:
    """Look for the package, which lowers and runs."""
    found = {PACKAGE: version_of(PACKAGE)} if find_spec(PACKAGE) else {}
    return Availability(
        lower=bool(found),
        run=bool(found),
        versions=found,
        remedy="" if found else f"executorch not found: {REMEDY}",
    )


def backend_of(options: Options) -> Backend:
    """The backend that is asked for; XNNPACK runs on every phone and processor."""
    return Backend(options.backend) if options.backend else Backend.XNNPACK


def option_problems(options: Options) -> list[str]:
    """Backends that can't be had here, and what is other targets' choice."""
    found = foreign_options(options, "executorch", own=("backend", "external_weights"))
    if options.backend is not None:
        found += executorch_backends.problems(options.backend)
    if options.backend == Backend.COREML and options.external_weights:
        found.append(
            "--external-weights: --backend coreml keeps the weights in its packages, inside the "
            "program"
        )
    return found


def adapt(recipe: Recipe, options: Options = DEFAULTS) -> Recipe:
    """The built-in recipe as the backend computes it; any other as it is."""
    return executorch_recipes.adapt(recipe, backend_of(options))


def problems(
    recipe: Recipe,
    layers: Mapping[str, int] | None,
    *,
    tied: bool = False,
    options: Options = DEFAULTS,
) -> list[str]:
    """Every reason why the backend cannot express an adapted recipe."""
    return executorch_recipes.problems(recipe, layers, backend_of(options))


def contract_problems(spec: ExportSpec, options: Options = DEFAULTS) -> list[str]:
    """A tokenizer that is larger than the head: the runner's sampler reads as many logits."""
    words, rows = spec.tokenizer.vocab_size, spec.decoder.vocab_size
    if words <= rows:
        return []
    return [
        f"The tokenizer has ids up to {words - 1}, the logits are {rows} wide: ExecuTorch's runner "
        "would read beyond them"
    ]


def lower(
    programs: Mapping[str, "ExportedProgram"],
    spec: ExportSpec,
    recipe: Recipe,
    out: Path,
    options: Options = DEFAULTS,
) -> Artifact:
    """Write the program and the client's files below the empty folder `out`."""
    backend, external = backend_of(options), bool(options.external_weights)
    lowered = _lowered(programs, spec, backend, external=external)
    if external and lowered.ptd is None:
        raise ExportError(
            f"--external-weights: no weight of this model is large enough for {WEIGHTS}.",
            "Leave --external-weights out.",
        )
    (out / PROGRAM).write_bytes(lowered.pte)
    if lowered.ptd is not None:
        (out / WEIGHTS).write_bytes(lowered.ptd)
    client_files.write_json(_client_files(spec), out)
    return Artifact(
        graphs=_graphs(spec),
        details={"backend": backend.value, "external_weights": int(external)},
    )


def _lowered(
    programs: Mapping[str, "ExportedProgram"], spec: ExportSpec, backend: Backend, *, external: bool
) -> "Lowered":
    if backend is Backend.COREML:
        from . import executorch_coreml  # noqa: PLC0415 - imports coremltools, executorch, torch

        return executorch_coreml.lower(programs, spec, constants(spec))
    from . import (  # noqa: PLC0415 - imports executorch and torch
        executorch_decoder,
        executorch_embedding,
        executorch_lowering,
        executorch_vision,
    )

    methods = {
        VISION: executorch_vision.vision_method(programs["vision"]),
        EMBEDDING: executorch_embedding.embedding_method(programs["embedding"], spec.context),
        DECODER: executorch_decoder.decoder_method(programs["decoder"], spec.decoder, spec.context),
    }
    partitioners = {name: executorch_backends.partitioners(backend, name) for name in methods}
    return executorch_lowering.lower(methods, partitioners, constants(spec), external=external)


def constants(spec: ExportSpec) -> dict[str, Any]:
    """Methods without inputs -> what they return: sizes and end tokens, for clients to ask.

    The runner reads `get_max_seq_len` and what follows it; optimum's loader the others.
    """
    ends = list(spec.eos_token_ids)
    return {
        "get_max_seq_len": spec.context,
        "get_max_context_len": spec.context,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": False,
        "get_vocab_size": spec.decoder.vocab_size,
        "vision_token_id": spec.image_token_id,
        "modality": "vision",
        **({"get_eos_ids": ends, "get_eos_id": ends[0]} if ends else {}),
    }


def _graphs(spec: ExportSpec) -> dict[str, dict[str, dict[str, str]]]:
    """Names, types and shapes of what goes in and comes out of each method."""
    side, width = spec.preprocessing.resolution, spec.decoder.hidden_size
    embeds = f"float32[1,sequence_length,{width}]"
    return {
        "vision": {
            "inputs": {"pixel_values": f"float32[1,3,{side},{side}]"},
            "outputs": {"image_features": f"float32[1,{spec.image_tokens},{width}]"},
        },
        "embedding": {
            "inputs": {"input_ids": "int64[1,sequence_length]"},
            "outputs": {"inputs_embeds": embeds},
        },
        "decoder": {
            "inputs": {"inputs_embeds": embeds, "cache_position": "int64[sequence_length]"},
            "outputs": {"logits": f"float32[1,1,{spec.decoder.vocab_size}]"},
        },
    }


def _client_files(spec: ExportSpec) -> dict[str, Any]:
    files = {"config.json": client_files.config(spec), **client_files.client_files(spec)}
    if spec.image_token_id >= spec.decoder.vocab_size:
        # The tokenizer with it would have more ids than there are logits; no text has it here.
        files["tokenizer.json"] = json.loads(spec.tokenizer.to_json())
    return files


def statements(
    bundle: Bundle,
    spec: ExportSpec,
    programs: "Callable[[], Mapping[str, ExportedProgram]] | None",
) -> Iterator[Statement]:
    """The client's files, the methods' interfaces, and what the program's constant methods return.

    That the methods are as `graphs` has them, `open` checks.
    """
    from .executorch_file import read  # noqa: PLC0415 - only where it is needed

    manifest, weights = bundle.manifest, bundle.path / WEIGHTS
    external = weights.exists()
    file = read(bundle.path / PROGRAM, weights if external else None)
    yield Statement(
        where=MANIFEST,
        found={"graphs": manifest.graphs, "artifact": manifest.artifact},
        wanted={
            "graphs": _graphs(spec),
            "artifact": {
                "backend": manifest.artifact.get("backend"),
                "external_weights": int(external),
            },
        },
    )
    said = {name: list(values) for name, values in file.constant_methods.items()}
    wanted = {
        name: list(value) if isinstance(value, list) else [value]
        for name, value in constants(spec).items()
    }
    yield Statement(where=PROGRAM, found=said, wanted=wanted)
    yield from client_files.statements(_client_files(spec), bundle.path)


def open(bundle: Bundle) -> Session:  # noqa: A001 - the name that every target gives it
    """Load the program into ExecuTorch's runtime. Raises ExportError for a damaged file."""
    from .executorch_session import ExecuTorchSession  # noqa: PLC0415 - imports executorch

    return ExecuTorchSession(bundle)


__all__ = [
    "RUNTIME_PACKAGES",
    "adapt",
    "availability",
    "backend_of",
    "constants",
    "contract_problems",
    "lower",
    "open",
    "option_problems",
    "problems",
    "statements",
]
