"""Faults in the graphs of target tensorrt, from which its engines are built.

No engine is built anew: the record of the build is made to name the altered graphs, as if the fault
had been there before. What runs without a GPU are the graphs.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from fastvlm_export.exporter.bundle import sha256_of
from fastvlm_export.targets.tensorrt_record import RECORD

from .base import Fault, NoPlaceError
from .graphs import (
    another_theta,
    attribute,
    convolutions_swapped,
    epsilon,
    fixed_pool,
    gelu_by_tanh,
    inputs_swapped,
    integer_convolution,
    layer,
    named,
    norm,
    nth,
    one_side,
    operator,
    output_scaled,
    overflowing,
    skipped,
    weights_of,
    weights_swapped,
)
from .numbers import (
    ChangeNumbers,
    heads_permuted,
    low_bits_more,
    not_a_number,
    one_angle,
    one_more,
    one_row_late,
    one_scaled,
    reversed_along,
    rows_swapped,
    zeros,
)
from .onnx_graph import Change, Graph, edited

VISION, EMBEDDING, DECODER = (f"onnx/{name}.onnx" for name in ("vision", "embedding", "decoder"))
FLOATS = ("fp32", "fp16", "bf16")
STATIC = ("int8", "int4")
HEAD = 32
"""Numbers of a head of the bundled decoder."""

Planned = tuple[str, str, Change, tuple[str, ...]]


def faults() -> Iterator[Fault]:
    """All of them; `core` where every recipe has the place."""
    for name, file, change, more in (*_vision(), *_integers(), *_decoder(), *_embedding()):
        recipes = tuple(one for one in more if one != "core")
        plant = _recorded(edited(file, change))
        yield Fault(name=name, plant=plant, core="core" in more, recipes=recipes)


def _recorded(plant: Callable[[Path], None]) -> Callable[[Path], None]:
    """Have the record of the build name the files as they are then."""

    def planted(folder: Path) -> None:
        plant(folder)
        record = json.loads((folder / RECORD).read_text("utf-8"))
        for graph in record["graphs"].values():
            graph["sources"] = {name: sha256_of(folder / name) for name in graph["sources"]}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (folder / RECORD).write_text(text, "utf-8")

    return planted


def _vision() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    conv, first, attention = nth("Conv", 20), nth("Conv", 0), nth("Attention", 1)
    yield "first convolution x1.001", VISION, output_scaled(first), core
    yield "middle convolution x1.001", VISION, output_scaled(conv), core
    yield "last convolution x1.001", VISION, output_scaled(nth("Conv", -3)), core
    yield "projector's first linear x1.001", VISION, output_scaled(layer(-2)), any_
    yield "projector's last linear x1.001", VISION, output_scaled(layer(-1)), core
    yield "tower's attention x1.001", VISION, output_scaled(attention), any_
    yield "one GELU by tanh", VISION, gelu_by_tanh(7), core
    yield "first GELU by tanh", VISION, gelu_by_tanh(0), any_
    yield "projector's GELU by tanh", VISION, gelu_by_tanh(-1), any_
    yield "every GELU by tanh", VISION, gelu_by_tanh(), core
    yield "tower's norm, epsilon x10", VISION, epsilon(norm(0), 10), any_
    yield "tower's norm, epsilon x100", VISION, epsilon(norm(-1), 100), any_
    yield "one weight of a convolution x1.001", VISION, weights_of(first, one_scaled), core
    yield "a convolution without bias", VISION, weights_of(first, zeros, 2), any_
    yield "BGR for RGB", VISION, weights_of(first, reversed_along(1)), core
    yield "two convolutions' weights swapped", VISION, convolutions_swapped, any_
    yield "tower's query and key swapped", VISION, inputs_swapped(attention, 0, 1), any_
    yield "a residual branch skipped", VISION, skipped(nth("Add", 3)), any_
    yield "squeeze-and-excite over a fixed window", VISION, fixed_pool, ("fp32", "fp16")
    pool, excite = nth("ReduceMean", -1), nth("Sigmoid", -1)
    yield "squeeze-and-excite by the maximum", VISION, operator(pool, "ReduceMax"), any_
    yield "squeeze-and-excite's hard sigmoid", VISION, operator(excite, "HardSigmoid"), any_
    yield "squeeze-and-excite without ReLU", VISION, skipped(nth("Relu", 0)), any_
    yield "padding on one side", VISION, attribute(first, "pads", [0, 0, 2, 2]), any_
    yield "an overflow in half precision", VISION, overflowing(conv), ("fp16",)
    yield "a weight that is not a number", VISION, weights_of(first, not_a_number), FLOATS


def _integers() -> Iterator[Planned]:
    static, integers = nth("QuantizeLinear", 10), integer_convolution
    yield "one integer of the tower +1", VISION, weights_of(integers, one_more), STATIC
    scale = weights_of(lambda graph: graph.maker(integers(graph).input[1]), one_scaled)
    yield "one scale of a tower's weight x1.001", VISION, scale, STATIC
    yield "one static range's scale x1.001", VISION, weights_of(static, one_scaled, 1), STATIC
    yield "one static zero point +1", VISION, weights_of(static, one_more, 2), STATIC
    yield "a range's scale of one side alone", VISION, one_side(1, one_scaled), (*STATIC, "fp8")
    yield "a zero point of one side alone", VISION, one_side(2, one_more), STATIC
    back = nth("DequantizeLinear", -10)
    yield "a dequantized tensor x1.001", VISION, output_scaled(back), STATIC
    yield "one integer of the decoder +1", DECODER, weights_of(layer(5), one_more), ("int8",)
    four = weights_of(layer(5), _one_of_four_bits)
    yield "one 4-bit integer of the decoder +1", DECODER, four, ("int4",)
    weight = _dequantized(layer(5))
    yield (
        "one scale of a decoder's weight x1.001",
        DECODER,
        weights_of(weight, one_scaled),
        (
            *STATIC,
            "fp8",
        ),
    )
    yield "one float8 weight", DECODER, weights_of(layer(5), one_scaled), ("fp8",)


def _decoder() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    attention, rotary = nth("Attention", 1), nth("RotaryEmbedding", 2)
    yield "first query x1.001", DECODER, output_scaled(layer(0)), any_
    yield "first down projection x1.001", DECODER, output_scaled(layer(6)), core
    yield "last down projection x1.001", DECODER, output_scaled(layer(-2)), core
    yield "head x1.001", DECODER, output_scaled(layer(-1)), core
    yield "attention x1.001", DECODER, output_scaled(attention), core
    yield "softmax scale x1.001", DECODER, attribute(attention, "scale", HEAD**-0.5 * 1.001), any_
    yield "key and value swapped", DECODER, inputs_swapped(attention, 1, 2), any_
    yield "gate and up swapped", DECODER, weights_swapped(layer(4), layer(5)), any_
    yield "first norm, epsilon x10", DECODER, epsilon(norm(0), 10), core
    yield "second norm, epsilon x100", DECODER, epsilon(norm(1), 100), core
    yield "last norm, epsilon x100", DECODER, epsilon(norm(-1), 100), any_
    weight = named("1.input_layernorm.weight", one_scaled)
    yield "one number of a norm's weight x1.001", DECODER, weight, core
    yield "one angle's cosine", DECODER, named("cos", one_angle(9)), core
    yield "one angle's sine", DECODER, named("sin", one_angle(18)), any_
    yield "one angle of a late position", DECODER, named("cos", one_angle(900)), any_
    yield "theta 1e4", DECODER, another_theta(1e4), core
    yield "cosines of the next position", DECODER, named("cos", one_row_late), any_
    yield "cosine and sine swapped", DECODER, inputs_swapped(rotary, 1, 2), any_
    yield "interleaved rotation", DECODER, attribute(rotary, "interleaved", 1), any_
    yield "one key's rotary position off by one", DECODER, _rotary_late, core
    yield "a cache written one position late", DECODER, _written_late, any_
    yield "a row does not see itself", DECODER, operator(nth("LessOrEqual", 0), "Less"), core
    yield "no causal mask in one layer", DECODER, _unmasked, any_
    yield "a query's bias dropped", DECODER, named("2.self_attn.q_proj.bias", zeros), any_
    yield "a value's bias dropped", DECODER, named("1.self_attn.v_proj.bias", zeros), any_
    yield "a SwiGLU skipped", DECODER, skipped(nth("Add", -1)), any_
    yield "two layers' MLPs swapped", DECODER, weights_swapped(layer(6), layer(13)), any_
    permuted = heads_permuted(HEAD, 1)
    yield "heads of the output permuted", DECODER, weights_of(layer(3), permuted), any_
    yield "SiLU's sigmoid made hard", DECODER, operator(nth("Sigmoid", 2), "HardSigmoid"), any_
    yield "one weight of the decoder x1.001", DECODER, weights_of(layer(3), one_scaled), FLOATS
    yield "one weight of the head x1.001", DECODER, weights_of(layer(-1), one_scaled), FLOATS
    yield "an overflow in the decoder", DECODER, overflowing(layer(4)), ("fp16",)


def _embedding() -> Iterator[Planned]:
    def table(change: ChangeNumbers) -> Change:
        return weights_of(nth("Gather", 0), change, 0)

    yield "one number of one embedding", EMBEDDING, table(one_scaled), FLOATS
    yield "one integer of one embedding", EMBEDDING, table(one_more), STATIC
    yield "two rows of the table swapped", EMBEDDING, table(rows_swapped), FLOATS


def _dequantized(find: Callable[[Graph], Any]) -> Callable[[Graph], Any]:
    """What makes a layer's weight a float."""

    def found(graph: Graph) -> Any:
        value = find(graph).input[1]
        while (node := graph.maker(value)) is not None:
            if node.op_type == "DequantizeLinear":
                return node
            value = node.input[0]
        raise NoPlaceError("the layer's weight is no integers")

    return found


def _one_of_four_bits(numbers: Any) -> Any:
    """Unpacked by NumPy's type, or two to a byte."""
    return (one_more if "int4" in str(numbers.dtype) else low_bits_more(4))(numbers)


def _rotary_late(graph: Graph) -> None:
    """A key of the second layer is turned by the next position's angles."""
    node = graph.nodes("RotaryEmbedding")[3]
    one = numpy_helper.from_array(np.array(1, np.int64), "one_position")
    graph.graph.initializer.append(one)
    added = helper.make_node("Add", [node.input[3], one.name], ["late_position"], name="late")
    graph.graph.node.insert(list(graph.graph.node).index(node), added)
    node.input[3] = "late_position"


def _written_late(graph: Graph) -> None:
    """A layer's values go one row further in the cache than its keys."""
    node = graph.nodes("TensorScatter")[3]
    one = numpy_helper.from_array(np.array([1], np.int64), "one_row")
    graph.graph.initializer.append(one)
    added = helper.make_node("Add", [node.input[2], one.name], ["late_row"], name="late")
    graph.graph.node.insert(list(graph.graph.node).index(node), added)
    node.input[2] = "late_row"


def _unmasked(graph: Graph) -> None:
    node = graph.nodes("Attention")[2]
    if len(node.input) < 4 or not node.input[3]:
        raise NoPlaceError("attention has no mask")
    node.input[3] = ""
