"""Faults in the packages of target coreml."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import Fault, NoPlaceError
from .mil import Change, Function, edited
from .mil_changes import (
    another_kind,
    bypassed,
    constant,
    epsilon,
    gelu_by_tanh,
    inputs_swapped,
    output_scaled,
    overflowing,
    read_each_other,
    static_range,
)
from .numbers import (
    THOUSANDTH,
    heads_permuted,
    low_bits_more,
    not_a_number,
    one_angle,
    one_more,
    one_row_late,
    one_scaled,
    plus,
    reversed_along,
    rows_swapped,
    times,
    zeros,
)

VISION = ("vision.mlpackage", "main")
EMBEDDING = ("embedding.mlpackage", "main")
PREFILL = ("decoder.mlpackage", "prefill")
DECODE = ("decoder.mlpackage", "decode")
FLOATS = ("fp32", "fp16")
STATIC = ("int8", "int4")
PALETTES = ("lut4", "lut6")
INTEGERS = "constexpr_blockwise_shift_scale"
TABLES = "constexpr_lut_to_dense"
HEAD = 32
"""Numbers of a head of the bundled decoder."""

Place = tuple[str, str]
Planned = tuple[str, Place, Change, tuple[str, ...]]


def faults() -> Iterator[Fault]:
    """All of them; `core` where every recipe has the place."""
    for name, (package, function), change, more in (*_vision(), *_stored(), *_decoder()):
        recipes = tuple(one for one in more if one != "core")
        plant = edited(package, function, change)
        yield Fault(name=name, plant=plant, core="core" in more, recipes=recipes)


def _vision() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    yield "first convolution x1.001", VISION, output_scaled("conv", 0), core
    yield "middle convolution x1.001", VISION, output_scaled("conv", 20), core
    yield "last convolution x1.001", VISION, output_scaled("conv", -3), any_
    yield "projector's first linear x1.001", VISION, output_scaled("linear", -2), any_
    yield "projector's last linear x1.001", VISION, output_scaled("linear", -1), core
    attention = "scaled_dot_product_attention"
    yield "tower's attention x1.001", VISION, output_scaled(attention, 1), core
    yield "one GELU by tanh", VISION, gelu_by_tanh(7), core
    yield "first GELU by tanh", VISION, gelu_by_tanh(0), any_
    yield "projector's GELU by tanh", VISION, gelu_by_tanh(-1), any_
    yield "every GELU by tanh", VISION, gelu_by_tanh(), core
    yield "tower's norm, epsilon x10", VISION, epsilon(0, 10), any_
    yield "tower's norm, epsilon x100", VISION, epsilon(-1, 100), any_
    yield "tower's norm without its mean", VISION, bypassed("sub", 0, "x"), any_
    yield "difference of a norm swapped", VISION, inputs_swapped("sub", 0, "x", "y"), any_
    yield (
        "one weight of a convolution x1.001",
        VISION,
        constant("conv", 0, "weight", one_scaled),
        core,
    )
    yield "a convolution without bias", VISION, constant("conv", 0, "bias", zeros), any_
    yield "BGR for RGB", VISION, constant("conv", 0, "weight", reversed_along(1)), core
    yield "two convolutions' weights swapped", VISION, _twins, any_
    yield (
        "tower's query and key swapped",
        VISION,
        inputs_swapped(attention, 0, "query", "key"),
        any_,
    )
    yield "a residual branch skipped", VISION, bypassed("add", 3, "x"), any_
    yield (
        "squeeze-and-excite by the maximum",
        VISION,
        another_kind("reduce_mean", -1, "reduce_max"),
        any_,
    )
    yield "squeeze-and-excite by tanh", VISION, another_kind("sigmoid", -1, "tanh"), any_
    yield "squeeze-and-excite without ReLU", VISION, bypassed("relu", 0, "x"), any_
    yield "padding on one side", VISION, _padding, any_
    yield "an overflow in half precision", VISION, overflowing("conv", 20), ("fp16",)
    yield (
        "a weight that is not a number",
        VISION,
        constant("conv", 0, "weight", not_a_number),
        any_,
    )


def _stored() -> Iterator[Planned]:
    yield "one integer of the tower +1", VISION, constant(INTEGERS, 12, "data", one_more), STATIC
    yield (
        "one scale of a tower's weight x1.001",
        VISION,
        constant(INTEGERS, 12, "scale", one_scaled),
        STATIC,
    )
    yield (
        "one static range's scale x1.001",
        VISION,
        static_range("scale", times(THOUSANDTH)),
        STATIC,
    )
    yield "one static zero point +1", VISION, static_range("zero_point", plus(1)), STATIC
    yield (
        "a range's scale of one side alone",
        VISION,
        constant("dequantize", 9, "scale", times(THOUSANDTH)),
        STATIC,
    )
    yield (
        "a zero point of one side alone",
        VISION,
        constant("quantize", 9, "zero_point", plus(1)),
        STATIC,
    )
    yield "a dequantized tensor x1.001", VISION, output_scaled("dequantize", 20), STATIC
    yield (
        "one integer of the decoder +1",
        PREFILL,
        constant(INTEGERS, 9, "data", low_bits_more(4)),
        STATIC,
    )
    yield (
        "one scale of the decoder x1.001",
        DECODE,
        constant(INTEGERS, 9, "scale", one_scaled),
        STATIC,
    )
    yield (
        "one integer of the head +1",
        PREFILL,
        constant(INTEGERS, -1, "data", low_bits_more(4)),
        STATIC,
    )
    yield (
        "one integer of one embedding +1",
        EMBEDDING,
        constant(INTEGERS, 0, "data", low_bits_more(4)),
        STATIC,
    )
    yield (
        "one scale of the table x1.001",
        EMBEDDING,
        constant(INTEGERS, 0, "scale", one_scaled),
        STATIC,
    )
    yield (
        "one index of the tower +1",
        VISION,
        constant(TABLES, 8, "indices", low_bits_more(4)),
        PALETTES,
    )
    yield (
        "one table entry of the tower x1.001",
        VISION,
        constant(TABLES, 8, "lut", one_scaled),
        PALETTES,
    )
    yield (
        "one index of the decoder +1",
        DECODE,
        constant(TABLES, 9, "indices", low_bits_more(4)),
        PALETTES,
    )
    yield (
        "one table entry of the decoder x1.001",
        PREFILL,
        constant(TABLES, 9, "lut", one_scaled),
        PALETTES,
    )
    yield (
        "one index of one embedding +1",
        EMBEDDING,
        constant(TABLES, 0, "indices", low_bits_more(4)),
        PALETTES,
    )
    yield "one number of one embedding", EMBEDDING, constant("gather", 0, "x", one_scaled), FLOATS
    yield (
        "two rows of the table swapped",
        EMBEDDING,
        constant("gather", 0, "x", rows_swapped),
        FLOATS,
    )
    yield "embeddings x1.001", EMBEDDING, output_scaled("gather", 0), ()


def _decoder() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    attention = "scaled_dot_product_attention"
    weight, bias = "weight", "bias"
    yield "first query x1.001, prefill", PREFILL, output_scaled("linear", 0), any_
    yield "first down projection x1.001, prefill", PREFILL, output_scaled("linear", 6), core
    yield "last down projection x1.001, decode", DECODE, output_scaled("linear", -2), core
    yield "head x1.001, prefill", PREFILL, output_scaled("linear", -1), core
    yield "attention x1.001, decode", DECODE, output_scaled(attention, 1), core
    yield "gate and up swapped", DECODE, read_each_other("linear", 4, 5, weight), any_
    yield "key and value swapped", PREFILL, inputs_swapped(attention, 1, "key", "value"), any_
    yield "first norm, epsilon x10, prefill", PREFILL, epsilon(0, 10), core
    yield "second norm, epsilon x100, decode", DECODE, epsilon(1, 100), core
    yield "last norm, epsilon x100", PREFILL, epsilon(-1, 100), any_
    yield "one number of a norm's weight x1.001", PREFILL, _norm_weight, core
    yield "one angle's cosine", PREFILL, constant("gather", 0, "x", one_angle(9)), core
    yield "one angle's sine", DECODE, constant("gather", 1, "x", one_angle(30)), any_
    yield "one angle of a late position", PREFILL, constant("gather", 0, "x", one_angle(900)), any_
    yield "theta 1e4", PREFILL, _theta(1e4), any_
    yield "cosines of the next position", PREFILL, constant("gather", 0, "x", one_row_late), any_
    yield "rotation the other way round", DECODE, inputs_swapped("sub", 0, "x", "y"), any_
    yield "position off by one while decoding", DECODE, _position, core
    yield "two layers share a cache", DECODE, _cache_of_another_layer, any_
    yield "a row sees the next, prefill", PREFILL, _sees_next, core
    yield "a row sees the next, decode", DECODE, _sees_next, any_
    yield "no causal mask in one layer", PREFILL, _unmasked, any_
    yield "a query's bias dropped", PREFILL, constant("linear", 14, bias, zeros), any_
    yield "a value's bias dropped", DECODE, constant("linear", 9, bias, zeros), any_
    yield "a SwiGLU skipped", DECODE, bypassed("add", -1, "x"), any_
    yield "two layers' MLPs swapped", PREFILL, read_each_other("linear", 6, 13, weight), any_
    yield "heads permuted", PREFILL, constant("linear", 0, weight, heads_permuted(HEAD, 0)), FLOATS
    yield (
        "heads of the output permuted",
        DECODE,
        constant("linear", 3, weight, heads_permuted(HEAD, 1)),
        FLOATS,
    )
    yield "SiLU by tanh", DECODE, another_kind("silu", 2, "tanh"), any_
    yield (
        "one weight of the decoder x1.001",
        PREFILL,
        constant("linear", 3, weight, one_scaled),
        FLOATS,
    )
    yield (
        "one weight of the head x1.001",
        DECODE,
        constant("linear", -1, weight, one_scaled),
        FLOATS,
    )
    yield "an overflow in the decoder", PREFILL, overflowing("silu", 1), ("fp16",)


def _twins(function: Function) -> None:
    """Two convolutions whose weights have one shape."""
    seen: dict[tuple[int, ...], Any] = {}
    for op in function.operations("conv")[10:]:
        maker = function.makers[function.source(op, "weight")]
        dimensions = maker.outputs[0].type.tensorType.dimensions
        shape = tuple(one.constant.size for one in dimensions)
        other = seen.setdefault(shape, op)
        if other is not op and function.source(other, "weight") != function.source(op, "weight"):
            source, another = function.source(op, "weight"), function.source(other, "weight")
            # Weights are made before anything reads them.
            order = [one.outputs[0].name for one in function.block.operations if one.outputs]
            if order.index(source) > order.index(other.outputs[0].name):
                moved = type(maker)()
                moved.CopyFrom(maker)
                function.block.operations.remove(maker)
                function.block.operations.insert(0, moved)
            function.read(op, "weight", another)
            function.read(other, "weight", source)
            return
    raise NoPlaceError("no two convolutions have one shape")


def _padding(function: Function) -> None:
    """Twice as much at the end, none at the beginning."""
    value = function.value_of(function.operations("conv")[0], "pad")
    function.store(value, np.array([0, 2, 0, 2], np.int32))


def _norm_weight(function: Function) -> None:
    """The constant that the third normalized value is multiplied by."""
    for op in function.operations("mul"):
        for name in ("x", "y"):
            source = op.inputs[name].arguments[0].name
            if source.endswith("1_input_layernorm_weight"):
                value = function.value_of(op, name)
                function.store(value, one_scaled(function.numbers(value)))
                return
    raise NoPlaceError("no norm has a weight of that name")


def _theta(base: float) -> Change:
    def change(function: Function) -> None:
        for op, turn in zip(function.operations("gather")[:2], (np.cos, np.sin), strict=True):
            value = function.value_of(op, "x")
            numbers = function.numbers(value)
            rows, half = numbers.shape[-2:]
            angles = np.outer(np.arange(rows), base ** -(np.arange(half) / half))
            function.store(value, turn(angles).reshape(numbers.shape).astype(numbers.dtype))

    return change


def _position(function: Function) -> None:
    """Rotary angles of the next position, for a single token."""
    for op in function.operations("gather")[:2]:
        function.read(op, "indices", "end")


def _cache_of_another_layer(function: Function) -> None:
    """The keys of the third layer are read from the second's."""
    op = function.operations("slice_by_index")[4]
    for name, change in (("begin", -1), ("end", -1)):
        value = function.value_of(op, name)
        numbers = function.numbers(value)
        numbers[0] += change
        function.store(value, numbers)


def _sees_next(function: Function) -> None:
    """A row's last visible position, plus one."""
    for op in function.operations("add"):
        if op.outputs[0].name == "seeing":
            value = function.value_of(op, "y")
            function.store(value, function.numbers(value) + 1)
            return
    raise NoPlaceError("nothing says what a row sees")


def _unmasked(function: Function) -> None:
    """One layer's attention without its mask."""
    op = function.operations("scaled_dot_product_attention")[2]
    if "attn_mask" not in op.inputs:
        raise NoPlaceError("attention has no mask")
    del op.inputs["attn_mask"]
