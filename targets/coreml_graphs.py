"""FastVLM's three graphs as Core ML packages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..exporter.config import DecoderConfig
from ..exporter.graphs import traced_inputs
from ..exporter.spec import ExportSpec
from ..quantize.quiet import quiet_import
from . import apple_app, client_files, coreml_decoder, coreml_ops, coreml_quantized
from .coreml_decoder import Cache, Rows, rows_from
from .coreml_lowering import Translator, Var
from .coreml_model import (
    DECODE,
    DECODER,
    EMBEDDING,
    EMBEDS,
    FEATURES,
    IDS,
    KEY_CACHE,
    KEY_REST,
    LENGTH,
    LOGITS,
    MAIN,
    PIXELS,
    POSITION,
    PREFILL,
    VALUE_CACHE,
    VALUE_REST,
    VISION,
)
from .coreml_package import FunctionSpec, Input, save

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere

TRANSLATIONS = {**coreml_ops.TRANSLATIONS, **coreml_quantized.TRANSLATIONS}

Graphs = Mapping[str, Mapping[str, Mapping[str, str]]]


def write(
    programs: Mapping[str, ExportedProgram],
    spec: ExportSpec,
    chunk: int,
    capacity: int,
    target: str,
    out: Path,
) -> Graphs:
    """Write vision, embedding and decoder packages and JSON files; returns their interfaces."""
    functions = {
        VISION: {MAIN: vision(programs["vision"], PIXELS)},
        EMBEDDING: {MAIN: embedding(programs["embedding"], spec)},
        DECODER: {
            PREFILL: _decoder(programs["decoder"], spec, chunk, capacity),
            DECODE: _decoder(programs["decoder"], spec, 1, capacity),
        },
    }
    outputs: dict[str, list[int | str]] = {
        FEATURES: [1, spec.image_tokens, spec.decoder.hidden_size],
        EMBEDS: [1, "sequence_length", spec.decoder.hidden_size],
        LOGITS: [1, spec.decoder.vocab_size],
    }
    for name, parts in functions.items():
        save(parts, target, out / name)
    client_files.write_json(json_files(spec), out)
    return {
        f"{Path(name).stem}.{function}": _signature(given, outputs[given.output])
        for name, parts in functions.items()
        for function, given in parts.items()
    }


def json_files(spec: ExportSpec) -> dict[str, Any]:
    """Name -> content of the files beside the packages."""
    return {"config.json": client_files.config(spec), **client_files.client_files(spec)}


def write_tower(program: ExportedProgram, target: str, path: Path) -> Graphs:
    """Write the vision tower without the projector, named as Apple's FastVLM app reads it."""
    tower = vision(program, apple_app.IMAGES, before_projector=True)
    save({MAIN: tower}, target, path)
    shape = [1, *map(int, unprojected(program).meta["val"].shape[1:])]
    return {f"{path.stem}.{MAIN}": _signature(tower, shape)}


def _static(program: ExportedProgram) -> ExportedProgram:
    """The program for one image, where every size is a number."""
    [pixels] = traced_inputs(program)
    shape = [1, *(int(size) for size in pixels.shape[1:])]
    module = program.module(check_guards=False)  # the traced sizes are examples
    with torch.no_grad():
        return torch.export.export(module, (torch.zeros(shape, dtype=pixels.dtype),))


def unprojected(program: ExportedProgram) -> Node:
    """What enters the projector, before any rounding of it: [1,N,features]."""
    targets = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }
    first = next(
        user
        for node in program.graph.nodes
        if targets.get(node.name, "").startswith("projector.")
        for user in _readers(node)
    )
    node: Node = first.all_input_nodes[0]
    while "quantize_per_tensor" in str(node.target):
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> list[Node]:
    """The linear layers that read a stored tensor, directly or as a dequantized weight."""
    found = []
    for user in node.users:
        found += [user] if "linear" in str(user.target) else _readers(user)
    return found


def vision(
    program: ExportedProgram, pixels: str, *, before_projector: bool = False
) -> FunctionSpec:
    """The tower and, unless before it, the projector: `pixels` [1,3,R,R] -> features [1,N,D]."""
    static = _static(program)
    until = unprojected(static) if before_projector else None

    def body(inputs: Mapping[str, Var]) -> Var:
        out = Translator(static, [inputs[pixels]], TRANSLATIONS).run(until)
        return out if until is None else mb.cast(x=out, dtype="fp32")

    [example] = traced_inputs(static)
    shape = tuple(int(size) for size in example.shape)
    return FunctionSpec(inputs={pixels: Input(shape=shape)}, output=FEATURES, body=body)


def embedding(program: ExportedProgram, spec: ExportSpec) -> FunctionSpec:
    """Ids [1,S] -> embeddings [1,S,D]."""

    def body(inputs: Mapping[str, Var]) -> Var:
        return Translator(program, [inputs[IDS]], TRANSLATIONS).run()

    ids = Input(shape=(1, 1), integer=True, longest=spec.context)
    return FunctionSpec(inputs={IDS: ids}, output=EMBEDS, body=body)


def _decoder(program: ExportedProgram, spec: ExportSpec, size: int, capacity: int) -> FunctionSpec:
    """`size` rows at a time: a chunk with `length`, or a single row."""
    config = spec.decoder
    inputs = {
        EMBEDS: Input(shape=(1, size, config.hidden_size)),
        POSITION: Input(shape=(1,), integer=True),
        **({LENGTH: Input(shape=(1,), integer=True)} if size > 1 else {}),
    }

    def body(given: Mapping[str, Var]) -> Var:
        rows = rows_from(given[POSITION], size, config.heads // config.kv_heads)
        found = decoder_logits(program, config, given, rows, given.get(LENGTH), capacity)
        return mb.squeeze(x=found, axes=[1])

    states = decoder_states(program, config, capacity)
    return FunctionSpec(inputs=inputs, output=LOGITS, body=body, states=states)


def decoder_states(
    program: ExportedProgram, config: DecoderConfig, capacity: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the cache of a decoder; a float32 one has twice as many."""
    names = [KEY_CACHE, VALUE_CACHE]
    first_key = traced_inputs(program)[2]
    if first_key.dtype is torch.float32:
        names += [KEY_REST, VALUE_REST]
    shape = (config.layers, 1, config.kv_heads, capacity, config.head_dim)
    return dict.fromkeys(names, shape)


def decoder_logits(
    program: ExportedProgram,
    config: DecoderConfig,
    given: Mapping[str, Var],
    rows: Rows,
    length: Var | None,
    capacity: int,
) -> Var:
    """[1,1,V] of the last row, or of the last of `length` [1]; see `decoder_states`."""
    states = {name: given[name] for name in decoder_states(program, config, capacity)}
    cache = Cache(config, states, rows, capacity)
    extra = coreml_decoder.translations(cache, length)
    nothing = [None] * (1 + 2 * config.layers)  # mask and past: the states are instead
    return Translator(program, [given[EMBEDS], *nothing], {**TRANSLATIONS, **extra}).run()


def _signature(function: FunctionSpec, output: Sequence[int | str]) -> dict[str, dict[str, str]]:
    """For the manifest: inputs, states and outputs -> name -> "float32[1,3,256,256]"."""

    def written(kind: str, shape: Sequence[int | str]) -> str:
        return f"{kind}[{','.join(map(str, shape))}]"

    found = {
        "inputs": {
            name: written(
                "int32" if given.integer else "float32",
                (*given.shape[:-1], "sequence_length") if given.longest else given.shape,
            )
            for name, given in function.inputs.items()
        },
        "outputs": {function.output: written("float32", output)},
    }
    if function.states:
        found["states"] = {n: written("float16", shape) for n, shape in function.states.items()}
    return found
