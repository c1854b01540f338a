"""Faults planted in a saved program, each of which the numbers without rounding show."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.executorch_flatbuffer import Table
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, VISION
from fastvlm_export.targets.executorch_xnn import xnn_constant, xnn_kind
from fastvlm_export.validate.limits import EXACT

from .recorded import Graph, Recorded

LIMIT = EXACT.logits


def changed_bytes(
    graph: Graph, data: memoryview, change: Callable[[Any], Any], dtype: Any
) -> bytes:
    """The program with one number changed in the middle of a constant of `dtype`."""
    numbers = np.frombuffer(data, dtype).copy()
    before = numbers.tobytes()
    middle = len(numbers) // 2
    numbers[middle] = change(numbers[middle])
    assert numbers.tobytes() != before
    at = graph.pte.index(before)
    return graph.pte[:at] + numbers.tobytes() + graph.pte[at + len(before) :]


def scaled(number: Any) -> Any:
    return number * np.float32(1.5)


def weights(graph: Graph, kind: str, node: str) -> Iterator[tuple[Table, memoryview]]:
    """Nodes of a kind with weights of a type, and their bytes."""
    for one in graph.nodes:
        if one.kind == node:
            value = graph.values[one.filter_id]
            tensor = value.fields.get("tensor_value", value)
            if xnn_kind(tensor) == kind:
                yield value, xnn_constant(graph.delegate, graph.table, tensor.constant_buffer_idx)


def in_weights(pte: bytes) -> Iterator[tuple[str, bytes]]:
    """One number of each kind of weight and scale."""
    vision, decoder = Graph.of(pte, VISION), Graph.of(pte, DECODER)
    value, data = next(weights(vision, "qcint8", "XNNConv2d"))
    yield "an int8 weight", changed_bytes(vision, data, lambda n: n ^ 64, np.int8)
    scales = xnn_constant(vision.delegate, vision.table, value.quant_params.scale_buffer_idx)
    yield "a scale of int8", changed_bytes(vision, scales, scaled, np.float32)
    _, data = next(weights(vision, "fp32", "XNNDepthwiseConv2d"))
    yield "a float of a depthwise kernel", changed_bytes(vision, data, scaled, np.float32)
    value, data = next(weights(decoder, "qbint4", "XNNFullyConnected"))
    yield "an int4 weight", changed_bytes(decoder, data, lambda n: n ^ 4, np.uint8)
    scales = xnn_constant(decoder.delegate, decoder.table, value.quant_params.scale_buffer_idx)
    yield "a scale of int4", changed_bytes(decoder, scales, lambda n: n ^ 64, np.uint16)
    first = next(one for one in vision.nodes if one.kind == "XNNConv2d")
    bias = vision.values[first.bias_id]
    data = xnn_constant(vision.delegate, vision.table, bias.constant_buffer_idx)
    yield "a bias", changed_bytes(vision, data, scaled, np.float32)
    [table, *_] = [x for x in Graph.of(pte, EMBEDDING).method.constants if x.dtype == "int8"]
    assert table.data is not None
    yield (
        "an int8 of the table",
        changed_bytes(vision, table.data[:1024], lambda n: n ^ 64, np.int8),
    )


def turned(graph: Graph, kind: str) -> bytes:
    """The program with the inputs of the first such operator the other way round."""
    node = next(one for one in graph.nodes if one.kind == kind)
    return graph.changed(node, input1_id=node.input2_id, input2_id=node.input1_id)


def in_decoder(pte: bytes) -> Iterator[tuple[str, bytes]]:
    """Inputs of its operators."""
    decoder = Graph.of(pte, DECODER)
    yield "new rows before the cache's", turned(decoder, "XNNConcatenate2")
    yield "a limit's operands", turned(decoder, "XNNSubtract")


def in_images(pte: bytes) -> Iterator[tuple[str, bytes]]:
    """Attributes and inputs of the encoder's operators."""
    vision = Graph.of(pte, VISION)
    first = next(one for one in vision.nodes if one.kind == "XNNConv2d")
    yield "padding moved down", vision.changed(first, padding_top=2, padding_bottom=0)
    yield "a difference turned around", turned(vision, "XNNSubtract")
    yield "a product turned around", turned(vision, "XNNBatchMatrixMultiply")
    gelu = next(one for one in vision.nodes if one.kind == "XNNGelu")
    reader = next(one for one in vision.nodes if reads(one) == gelu.output_id)
    field = "input_id" if "input_id" in reader.fields else "input1_id"
    yield "a GELU left out", vision.changed(reader, **{field: gelu.input_id})
    for entry in vision.table.xnodes:
        if entry.output_min_max is not None:
            yield "an output's limit", vision.changed(entry.output_min_max, output_max=0.01)
            break
    parameters = next(
        vision.values[one.input1_id].quant_params
        for one in vision.nodes
        if one.kind == "XNNConv2d" and "quant_params" in vision.values[one.input1_id].fields
    )
    yield "a range's scale", vision.changed(parameters, scale=parameters.scale * 1.001)
    yield "a range's zero point", vision.changed(parameters, zero_point=parameters.zero_point + 40)


def reads(node: Table) -> int | None:
    """The first value that a node reads."""
    found: int | None = node.fields.get("input_id", node.fields.get("input1_id"))
    return found


def in_calls(pte: bytes) -> Iterator[tuple[str, bytes]]:
    """Constants of what is computed outside of delegates: rotary tables and positions."""
    decoder = Graph.of(pte, DECODER)
    for name, operator, dtype, change in (
        ("a rotary angle", "aten::index.Tensor_out", np.float32, lambda n: n * np.float32(1.01)),
        ("a place of the cache", "aten::slice_copy.Tensor_out", np.int64, lambda n: 0),
    ):
        call = next(
            step
            for step in decoder.method.calls
            if step.operator == operator and step.args[0].data is not None
        )
        data = call.args[0].data
        row = len(data) // call.args[0].sizes[0]
        yield name, changed_bytes(decoder, data[: 20 * row], change, dtype)


@pytest.mark.parametrize(
    ("faults", "methods"),
    [
        (in_weights, (VISION, EMBEDDING, DECODER)),
        (in_images, (VISION,)),
        (in_decoder, (DECODER,)),
        (in_calls, (DECODER,)),
    ],
)
def test_each_fault_is_seen(
    small: Recorded,
    faults: Callable[[bytes], Iterator[tuple[str, bytes]]],
    methods: tuple[str, ...],
) -> None:
    assert max(small.differences(small.pte, *methods).values()) <= LIMIT / 10
    found: dict[str, float | str] = {}
    for name, pte in faults(small.pte):
        try:
            found[name] = max(small.differences(pte, *methods).values())
        except ExportError as error:
            found[name] = str(error)
    unseen = [name for name, one in found.items() if isinstance(one, float) and one <= LIMIT]
    assert not unseen, found
