"""Tiny Core ML packages with the names and shapes of a bundle's, written by coremltools.

Their arithmetic shows what a session gives them. The decoder keeps embeddings as keys, twice
them as values, and answers with the sum over the visible positions j of (j + 1) times both: what
is lost, moved, seen too early or padded with anything but zeros that don't count changes it.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import coreml_model as names

with quiet_import():
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813 - as Apple writes it
    from coremltools.converters.mil.mil import Function, Program, Symbol, types

R, N, D, V = 4, 2, 4, 5
CHUNK, CONTEXT = 4, 13
CAPACITY = CONTEXT + CHUNK - 1
TABLE = np.arange(V * D, dtype=np.float32).reshape(V, D) / 8 - 1
HEAD = (np.arange(2 * D * V, dtype=np.float32).reshape(2 * D, V) % 7 - 3) / 4
_OPSET = ct.target.iOS18


def vision_of(pixels: np.ndarray) -> np.ndarray:
    """What the vision package computes: [1,3,R,R] -> [1,N,D]."""
    return pixels.mean((1, 2, 3))[:, None, None] + TABLE[None, :N]


def logits_of(embeds: np.ndarray) -> np.ndarray:
    """What the decoder computes of all the embeddings [1,S,D] so far, in one go -> [1,V]."""
    weighted = (np.arange(1, embeds.shape[1] + 1)[:, None] * embeds[0]).sum(0)
    return (np.concatenate([weighted, 2 * weighted])[None] @ HEAD).astype(np.float32)


def write_bundle(folder: Path) -> Any:
    """The three packages in this folder, and what a session reads of a bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(_vision(), folder / names.VISION)
    length = ct.RangeDim(lower_bound=1, upper_bound=CONTEXT, default=1)
    ids = ct.TensorType(name=names.IDS, shape=(1, length), dtype=np.int32)
    _save(_embedding(), folder / names.EMBEDDING, [ids])
    _save_decoder(folder)
    manifest = SimpleNamespace(context=CONTEXT, target="coreml", artifact={"layout": "fastvlm"})
    return SimpleNamespace(path=folder, manifest=manifest)


def _save(program: Program, path: Path, inputs: Any = None) -> None:
    model = ct.convert(
        program,
        convert_to="mlprogram",
        inputs=inputs,
        minimum_deployment_target=_OPSET,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(path))


def _save_decoder(folder: Path) -> None:
    described = ct.utils.MultiFunctionDescriptor()
    for function, length in ((names.PREFILL, CHUNK), (names.DECODE, 1)):
        path = folder / f"{function}.mlpackage"
        _save(_decoder(length), path)
        described.add_function(str(path), names.MAIN, function)
    described.default_function_name = names.PREFILL
    ct.utils.save_multifunction(described, str(folder / names.DECODER))
    for function in (names.PREFILL, names.DECODE):
        shutil.rmtree(folder / f"{function}.mlpackage")


def _program(inputs: dict[str, Any], outputs: Any) -> Program:
    """One function `main`; `outputs` is given its inputs and builds the rest."""
    with Function(inputs, opset_version=_OPSET) as function:
        function.set_outputs([outputs(**function.inputs)])
    program = Program()
    program.add_function(names.MAIN, function)
    return program


def _vision() -> Program:
    def features(pixel_values: Any) -> Any:
        mean = mb.reduce_mean(x=pixel_values, axes=[1, 2, 3], keep_dims=False)
        mean = mb.reshape(x=mean, shape=[1, 1, 1])
        return mb.add(x=mean, y=TABLE[None, :N], name=names.FEATURES)

    return _program({names.PIXELS: mb.placeholder((1, 3, R, R), types.fp32)}, features)


def _embedding() -> Program:
    def embeds(input_ids: Any) -> Any:
        return mb.gather(x=TABLE, indices=input_ids, axis=0, name=names.EMBEDS)

    ids = mb.placeholder((1, Symbol("S")), types.int32, name=names.IDS)
    return _program({names.IDS: ids}, embeds)


def _decoder(length: int) -> Program:
    """prefill for a chunk's length, decode for 1."""
    cache = (1, 1, 1, CAPACITY, D)
    inputs = {
        names.EMBEDS: mb.placeholder((1, length, D), types.fp32),
        names.POSITION: mb.placeholder((1,), types.int32),
        names.KEY_CACHE: mb.state_tensor_placeholder(cache, types.fp16),
        names.VALUE_CACHE: mb.state_tensor_placeholder(cache, types.fp16),
    }
    if length > 1:
        inputs[names.LENGTH] = mb.placeholder((1,), types.int32)

    def logits(inputs_embeds: Any, position: Any, length: Any = None, **states: Any) -> Any:
        rows = mb.reshape(x=inputs_embeds, shape=[1, 1, 1, -1, D])
        keys = _append(states[names.KEY_CACHE], rows, position)
        doubled = mb.mul(x=rows, y=np.float32(2))
        values = _append(states[names.VALUE_CACHE], doubled, position)
        end = mb.add(x=position, y=np.array([1], np.int32) if length is None else length)
        index = np.arange(CAPACITY, dtype=np.int32)
        weights = mb.cast(x=mb.less(x=index, y=end), dtype="fp32")
        weights = mb.mul(x=weights, y=(index + 1).astype(np.float32))
        weights = mb.reshape(x=weights, shape=[1, CAPACITY])
        both = [mb.matmul(x=weights, y=one) for one in (keys, values)]
        return mb.matmul(x=mb.concat(values=both, axis=1), y=HEAD, name=names.LOGITS)

    return _program(inputs, logits)


def _append(state: Any, rows: Any, position: Any) -> Any:
    """Write rows [1,1,1,S,D] at the position -> the whole state, [capacity,D] float32."""
    zeros = np.zeros(3, np.int32)
    begin = mb.concat(values=[zeros, position, zeros[:1]], axis=0)
    end = mb.add(x=begin, y=np.array([1, 1, 1, rows.shape[3], D], np.int32))
    whole = mb.slice_update(
        x=mb.read_state(input=state), update=mb.cast(x=rows, dtype="fp16"), begin=begin, end=end
    )
    whole = mb.coreml_update_state(state=state, value=whole)
    return mb.reshape(x=mb.cast(x=whole, dtype="fp32"), shape=[CAPACITY, D])
