"""Faults in the graphs of target onnx."""

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .base import Fault
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
    weight_dequantized,
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

VISION, EMBEDDING, DECODER = (
    f"onnx/{name}*.onnx" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
)
FLOATS = ("fp32", "fp16")
STATIC = ("int8", "int4")
HEAD = 32
"""Numbers of a head of the bundled decoder."""


def faults() -> Iterator[Fault]:
    """All of them; `core` where every recipe has the place."""
    for name, file, change, more in (*_vision(), *_integers(), *_decoder(), *_embedding()):
        recipes = tuple(one for one in more if one != "core")
        yield Fault(name=name, plant=edited(file, change), core="core" in more, recipes=recipes)


Planned = tuple[str, str, Change, tuple[str, ...]]


def _vision() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    conv, first = nth("Conv", 20), nth("Conv", 0)
    yield "first convolution x1.001", VISION, output_scaled(first), core
    yield "middle convolution x1.001", VISION, output_scaled(conv), core
    yield "last convolution x1.001", VISION, output_scaled(nth("Conv", -3)), core
    yield "projector's first linear x1.001", VISION, output_scaled(layer(-2)), any_
    yield "projector's last linear x1.001", VISION, output_scaled(layer(-1)), core
    attended = nth("Softmax", 1)
    yield "tower's attention weights x1.001", VISION, output_scaled(attended), any_
    yield "one GELU by tanh", VISION, gelu_by_tanh(7), core
    yield "first GELU by tanh", VISION, gelu_by_tanh(0), any_
    yield "projector's GELU by tanh", VISION, gelu_by_tanh(-1), any_
    yield "every GELU by tanh", VISION, gelu_by_tanh(), core
    yield "tower's norm, epsilon x10", VISION, epsilon(norm(0), 10), ("fp32", "int8", "int4")
    yield "tower's norm, epsilon x100", VISION, epsilon(norm(-1), 100), ("fp32", "int8", "int4")
    yield "one weight of a convolution x1.001", VISION, weights_of(first, one_scaled), core
    yield "a convolution without bias", VISION, weights_of(first, zeros, 2), any_
    yield "BGR for RGB", VISION, weights_of(first, reversed_along(1)), core
    yield "two convolutions' weights swapped", VISION, convolutions_swapped, any_
    yield "tower's query and key swapped", VISION, _query_and_key, any_
    yield "a residual branch skipped", VISION, skipped(nth("Add", 3)), any_
    yield "squeeze-and-excite over a fixed window", VISION, fixed_pool, any_
    yield (
        "squeeze-and-excite by the maximum",
        VISION,
        operator(nth("ReduceMean", -1), "ReduceMax"),
        any_,
    )
    yield (
        "squeeze-and-excite's hard sigmoid",
        VISION,
        operator(nth("Sigmoid", -1), "HardSigmoid"),
        any_,
    )
    yield "squeeze-and-excite without ReLU", VISION, skipped(nth("Relu", 0)), any_
    yield "padding on one side", VISION, attribute(first, "pads", [0, 0, 2, 2]), any_
    yield "an overflow in half precision", VISION, overflowing(conv), ("fp16",)
    yield "a weight that is not a number", VISION, weights_of(first, not_a_number), any_


def _integers() -> Iterator[Planned]:
    static = nth("QuantizeLinear", 10)
    back = nth("DequantizeLinear", -10)
    yield "one integer of the tower +1", VISION, weights_of(integer_convolution, one_more), STATIC
    yield (
        "one scale of a tower's weight x1.001",
        VISION,
        weights_of(weight_dequantized, one_scaled),
        STATIC,
    )
    yield "one static range's scale x1.001", VISION, weights_of(static, one_scaled, 1), STATIC
    yield "one static zero point +1", VISION, weights_of(static, one_more, 2), STATIC
    yield "a range's scale of one side alone", VISION, one_side(1, one_scaled), STATIC
    yield "a zero point of one side alone", VISION, one_side(2, one_more), STATIC
    yield "one integer bias +1", VISION, weights_of(integer_convolution, one_more, 2), STATIC
    yield "a dequantized tensor x1.001", VISION, output_scaled(back), STATIC
    yield "one integer of the decoder +1", DECODER, weights_of(layer(5), one_more), ("int8",)
    yield (
        "one 4-bit integer of the decoder +1",
        DECODER,
        weights_of(layer(5), low_bits_more(4)),
        ("int4",),
    )
    yield (
        "one scale of a decoder's weight x1.001",
        DECODER,
        named("scale.channels", one_scaled),
        ("int8",),
    )
    yield (
        "one scale of a 4-bit group x1.001",
        DECODER,
        weights_of(nth("MatMulNBits", 4), one_scaled, 2),
        ("int4",),
    )
    yield (
        "activations' zero point +1",
        DECODER,
        weights_of(nth("MatMulInteger", 3), one_more, 2),
        ("int8",),
    )


def _decoder() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    attention = nth("GroupQueryAttention", 1)
    yield "first query x1.001", DECODER, output_scaled(layer(0)), any_
    yield "first down projection x1.001", DECODER, output_scaled(layer(6)), core
    yield "last down projection x1.001", DECODER, output_scaled(layer(-2)), core
    yield "head x1.001", DECODER, output_scaled(layer(-1)), core
    yield "attention x1.001", DECODER, output_scaled(attention), core
    yield "softmax scale x1.001", DECODER, attribute(attention, "scale", HEAD**-0.5 * 1.001), any_
    yield "key and value swapped", DECODER, inputs_swapped(attention, 1, 2), any_
    yield "gate and up swapped", DECODER, weights_swapped(layer(4), layer(5)), FLOATS
    yield "first norm, epsilon x10", DECODER, epsilon(norm(0), 10), core
    yield "second norm, epsilon x100", DECODER, epsilon(norm(1), 100), core
    yield "last norm, epsilon x100", DECODER, epsilon(norm(-1), 100), any_
    yield (
        "one number of a norm's weight x1.001",
        DECODER,
        named("1.input_layernorm.weight", one_scaled),
        core,
    )
    yield "one angle's cosine", DECODER, named("cos", one_angle(9)), core
    yield "one angle's sine", DECODER, named("sin", one_angle(18)), any_
    yield "one angle of a late position", DECODER, named("cos", one_angle(900)), any_
    yield "theta 1e4", DECODER, another_theta(1e4), core
    yield "cosines of the next position", DECODER, named("cos", one_row_late), any_
    yield "cosine and sine swapped", DECODER, inputs_swapped(attention, 7, 8), any_
    yield "cache position off by one", DECODER, _position, core
    yield (
        "a window in place of the causal mask",
        DECODER,
        attribute(attention, "local_window_size", 16),
        any_,
    )
    yield "a query's bias dropped", DECODER, named("2.self_attn.q_proj.bias", zeros), any_
    yield "a value's bias dropped", DECODER, named("1.self_attn.v_proj.bias", zeros), any_
    yield "a SwiGLU skipped", DECODER, skipped(layer(6)), FLOATS
    yield "two layers' MLPs swapped", DECODER, weights_swapped(layer(6), layer(13)), FLOATS
    yield "heads permuted", DECODER, weights_of(layer(0), heads_permuted(HEAD, 1)), FLOATS
    yield (
        "heads of the output permuted",
        DECODER,
        weights_of(layer(3), heads_permuted(HEAD, 0)),
        FLOATS,
    )
    yield "SiLU's sigmoid made hard", DECODER, operator(nth("Sigmoid", 2), "HardSigmoid"), any_
    yield "logits of the first position", DECODER, _first_position, any_
    yield "one weight of the decoder x1.001", DECODER, weights_of(layer(3), one_scaled), FLOATS
    yield "one weight of the head x1.001", DECODER, weights_of(layer(-1), one_scaled), FLOATS
    yield "one integer of the head +1", DECODER, weights_of(layer(-1), one_more), STATIC
    yield "an overflow in the decoder", DECODER, overflowing(layer(4)), ("fp16",)


def _embedding() -> Iterator[Planned]:
    yield "one number of one embedding", EMBEDDING, _table(one_scaled), FLOATS
    yield "one integer of one embedding", EMBEDDING, _table(one_more), STATIC
    yield "two rows of the table swapped", EMBEDDING, _table(rows_swapped), ()


def _query_and_key(graph: Graph) -> None:
    """softmax(k q') in the place of softmax(q k')."""
    scores = graph.maker(graph.nodes("Softmax")[0].input[0])
    query, key = (graph.maker(value) for value in scores.input[:2])
    query.input[0], key.input[0] = key.input[0], query.input[0]


def _position(graph: Graph) -> None:
    """A single token is written over the one before it, and does not see it."""
    value = graph.nodes("GroupQueryAttention")[0].input[5]
    constant = numpy_helper.from_array(np.array(1, np.int64), "one_row")
    graph.graph.initializer.append(constant)
    made = [
        helper.make_node("Shape", ["inputs_embeds"], ["rows"], start=1, end=2),
        helper.make_node("Squeeze", ["rows"], ["row_count"]),
        helper.make_node("Equal", ["row_count", "one_row"], ["is_single"]),
        helper.make_node("Cast", ["is_single"], ["single"], to=TensorProto.INT32),
        helper.make_node("Sub", [value, "single"], ["position_before"]),
    ]
    for node in graph.nodes("GroupQueryAttention"):
        node.input[5] = "position_before"
    place = list(graph.graph.node).index(graph.nodes("GroupQueryAttention")[0])
    for number, node in enumerate(made):
        graph.graph.node.insert(place + number, node)


def _first_position(graph: Graph) -> None:
    """The logits of a prompt's first position; of a single token they are right."""
    node = graph.nodes("Slice")[-1]
    for at, number in ((1, 0), (2, 1)):
        made = numpy_helper.from_array(np.array([number], np.int64), f"first_{at}")
        graph.graph.initializer.append(made)
        node.input[at] = made.name


def _table(change: ChangeNumbers) -> Change:
    return weights_of(nth("Gather", 0), change, 0)
