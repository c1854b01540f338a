"""Faults in the program of target executorch, most of them in XNNPACK's graphs."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fastvlm_export.targets.executorch_flatbuffer import Table
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, VISION

from .base import Alteration, Fault, NoPlaceError
from .numbers import (
    THOUSANDTH,
    ChangeNumbers,
    low_bits_more,
    not_a_number,
    one_angle,
    one_more,
    one_row_late,
    one_scaled,
    rows_swapped,
    times,
    zeros,
)
from .programs import gelu_by_tanh
from .pte import Change, Graph, Program, edited
from .xnn_changes import (
    bias,
    bypassed,
    convolution,
    exchanged,
    kind,
    layer,
    node,
    output_scaled,
    scales,
    swapped,
    weight,
)

FLOATS, INTEGERS = ("fp32",), ("int8", "int4")
HEAD = 32
"""Numbers of a head of the bundled decoder."""
WORDS, WIDTH = 448, 128
"""Rows and columns of the bundled embedding table."""

Planned = tuple[str, str, Change, tuple[str, ...]]


def faults() -> Iterator[Fault]:
    """All of them; `core` where every recipe has the place."""
    for name, method, change, more in (*_vision(), *_integers(), *_decoder(), *_embedding()):
        recipes = tuple(one for one in more if one != "core")
        plant = edited(method, change)
        yield Fault(name=name, plant=plant, core="core" in more, recipes=recipes)
    for name, alter in _lowered():
        yield Fault(name=name, alter=alter, core=True)


def _lowered() -> Iterator[tuple[str, Alteration]]:
    """What takes more operators than there are: another program is lowered."""
    yield "one GELU by tanh", gelu_by_tanh(7)
    yield "every GELU by tanh", gelu_by_tanh()


def _vision() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    first, middle, last = convolution(0), convolution(40), convolution(-3)
    yield "first convolution x1.001", VISION, output_scaled(first), core
    yield "middle convolution x1.001", VISION, output_scaled(middle), core
    yield "last convolution x1.001", VISION, output_scaled(last), core
    yield "projector's first linear x1.001", VISION, output_scaled(layer(-2)), any_
    yield "projector's last linear x1.001", VISION, output_scaled(layer(-1)), core
    yield "one GELU by hard swish", VISION, kind(node("Gelu", 7), "Hardswish"), any_
    yield "projector's GELU by hard swish", VISION, kind(node("Gelu", -1), "Hardswish"), any_
    yield "tower's epsilon x10", VISION, _epsilon(10), any_
    yield "tower's epsilon x100", VISION, _epsilon(100), any_
    yield "a norm's difference swapped", VISION, swapped(node("Subtract", 0)), any_
    yield "one weight of a convolution x1.001", VISION, weight(first, one_scaled), FLOATS
    yield "one bias of a convolution x1.001", VISION, bias(first, one_scaled), core
    yield "a convolution without bias", VISION, bias(first, zeros), any_
    yield "BGR for RGB", VISION, weight(first, _channels_reversed), core
    yield "two convolutions' weights swapped", VISION, _twins, any_
    yield "a residual branch skipped", VISION, bypassed(node("Add", 30), "input1_id"), any_
    yield "tower's softmax skipped", VISION, bypassed(node("Softmax", 1), "input_id"), any_
    yield "squeeze-and-excite by tanh", VISION, kind(node("Sigmoid", -1), "Tanh"), any_
    yield "padding on one side", VISION, _padding, any_
    yield "a weight that is not a number", VISION, weight(first, not_a_number), any_


def _integers() -> Iterator[Planned]:
    integers = _integer_convolution
    yield "one integer of the tower +1", VISION, weight(integers, one_more), INTEGERS
    yield "one scale of a tower's weight x1.001", VISION, scales(integers, one_scaled), INTEGERS
    yield "one integer bias +1", VISION, bias(integers, one_more), INTEGERS
    yield "one static range's scale x1.001", VISION, _range(scale=THOUSANDTH), INTEGERS
    yield "one static zero point +1", VISION, _range(zero_point=1), INTEGERS
    yield "one integer of the decoder +1", DECODER, weight(layer(5), one_more), ("int8",)
    yield (
        "one 4-bit integer of the decoder +1",
        DECODER,
        weight(layer(5), low_bits_more(4)),
        ("int4",),
    )
    yield "one scale of the decoder x1.001", DECODER, scales(layer(5), one_scaled), ("int8",)
    yield "one scale of a 4-bit group", DECODER, scales(layer(5), one_more), ("int4",)
    yield "one integer of the head +1", DECODER, weight(layer(-1), one_more), INTEGERS
    yield "one integer of one embedding +1", EMBEDDING, _table(np.int8, one_more), INTEGERS
    yield "one scale of the table x1.001", EMBEDDING, _row_scales(one_scaled), INTEGERS


def _decoder() -> Iterator[Planned]:
    core, any_ = ("core",), ()
    yield "first query x1.001", DECODER, output_scaled(layer(0)), any_
    yield "first down projection x1.001", DECODER, output_scaled(layer(6)), core
    yield "last down projection x1.001", DECODER, output_scaled(layer(-2)), core
    yield "head x1.001", DECODER, output_scaled(layer(-1)), core
    yield "softmax scale x1.001", DECODER, _softmax_scale, any_
    yield "gate and up swapped", DECODER, exchanged(layer(4), layer(5)), any_
    yield "key and value swapped", DECODER, exchanged(layer(1), layer(2)), any_
    yield "two layers' MLPs swapped", DECODER, exchanged(layer(6), layer(13)), any_
    yield "epsilon x10", DECODER, _epsilon(10), core
    yield "epsilon x100", DECODER, _epsilon(100), any_
    yield "one number of a norm's weight x1.001", DECODER, _norm_weight, core
    yield "one angle's cosine", DECODER, angles(0, one_angle(9)), core
    yield "one angle's sine", DECODER, angles(1, one_angle(18)), any_
    yield "one angle of a late position", DECODER, angles(0, one_angle(900)), any_
    yield "theta 1e4", DECODER, _theta(1e4), core
    yield "cosines of the next position", DECODER, angles(0, one_row_late), any_
    yield "cosine and sine swapped", DECODER, _tables_swapped, any_
    yield "keys written into the values' cache", DECODER, _caches_swapped, any_
    yield "mask by another difference", DECODER, swapped(node("Subtract", 0)), core
    yield "a key's rotation skipped", DECODER, bypassed(node("Add", 2), "input1_id"), any_
    yield "a query's bias dropped", DECODER, bias(layer(14), zeros), any_
    yield "a value's bias dropped", DECODER, bias(layer(9), zeros), any_
    yield "a softmax skipped", DECODER, bypassed(node("Softmax", 2), "input_id"), any_
    yield "SiLU's sigmoid by tanh", DECODER, kind(node("Sigmoid", 2), "Tanh"), any_
    yield "a SwiGLU's gate skipped", DECODER, _gate_skipped, any_
    yield "one weight of the decoder x1.001", DECODER, weight(layer(3), one_scaled), FLOATS
    yield "one weight of the head x1.001", DECODER, weight(layer(-1), one_scaled), FLOATS
    yield "heads of the output permuted", DECODER, weight(layer(3), _heads_permuted), FLOATS


def _embedding() -> Iterator[Planned]:
    yield "one number of one embedding", EMBEDDING, _table(np.float32, one_scaled), FLOATS
    yield "two rows of the table swapped", EMBEDDING, _table(np.float32, rows_swapped), FLOATS


def angles(index: int, change: ChangeNumbers) -> Change:
    """Other numbers in the table of cosines (0) or sines (1)."""

    def altered(program: Program) -> None:
        table = _rotary(program)[index]
        program.store(
            table.data, change(np.frombuffer(table.data, np.float32).reshape(table.sizes))
        )

    return altered


def _rotary(program: Program) -> list[Any]:
    """Both tables, in the order that they are looked up in."""
    found = [
        call.args[0] for call in program.method.calls if call.operator == "aten::index.Tensor_out"
    ]
    tables = [one for one in found if one.data is not None]
    if len(tables) != 2:
        raise NoPlaceError("there are no rotary tables")
    return tables


def _theta(base: float) -> Change:
    def altered(program: Program) -> None:
        for table, turn in zip(_rotary(program), (np.cos, np.sin), strict=True):
            rows, half = table.sizes
            turned = np.outer(np.arange(rows), base ** -(np.arange(half) / half))
            program.store(table.data, turn(turned).astype(np.float32))

    return altered


def _tables_swapped(program: Program) -> None:
    """Sines where cosines are looked up, and the other way round."""
    calls = [one for one in program.calls("aten::index") if len(one.args) == 4]
    if len(calls) < 2:
        raise NoPlaceError("nothing is looked up")
    first, second = calls[0].args[0], calls[1].args[0]
    program.set_argument(calls[0], 0, second)
    program.set_argument(calls[1], 0, first)


def _caches_swapped(program: Program) -> None:
    """A layer's keys go where its values belong, and the other way round."""
    calls = program.calls("aten::index_put_")
    if len(calls) < 4:
        raise NoPlaceError("there is no cache")
    first, second = calls[2].args, calls[3].args
    for number in (0, len(first) - 1):
        program.set_argument(calls[2], number, second[number])
        program.set_argument(calls[3], number, first[number])


def _epsilon(factor: float) -> Change:
    """What every norm adds to its mean square: they share the constant."""

    def altered(program: Program) -> None:
        graph = program.graph
        root = graph.nodes("ReciprocalSquareRoot")[0]
        [added] = [
            entry.xnode_union
            for entry in graph.table.xnodes
            if entry.xnode_union.kind == "XNNAdd" and entry.xnode_union.output_id == root.input_id
        ]
        for index in (added.input1_id, added.input2_id):
            if graph.is_constant(index):
                view = graph.constant(index)
                program.store(view, times(factor)(np.frombuffer(view, np.float32)))
                return
        raise NoPlaceError("the norm adds no constant")

    return altered


def _norm_weight(program: Program) -> None:
    """A weight of as many numbers as an embedding has."""
    graph = program.graph
    for found in graph.nodes("Multiply"):
        index = found.input2_id
        tensor = graph.tensor(index)
        if graph.is_constant(index) and np.prod(tensor.dims) == WIDTH:
            view = graph.constant(index)
            program.store(view, one_scaled(np.frombuffer(view, np.float32)))
            return
    tensors = program.tensors(WIDTH)
    program.store(tensors[0].data, one_scaled(np.frombuffer(tensors[0].data, np.float32)))  # type: ignore[arg-type]


def _softmax_scale(program: Program) -> None:
    """What a layer's queries are multiplied by."""
    graph = program.graph
    for found in graph.nodes("Multiply"):
        tensor = graph.tensor(found.input2_id)
        if graph.is_constant(found.input2_id) and np.prod(tensor.dims) == 1:
            view = graph.constant(found.input2_id)
            number = np.frombuffer(view, np.float32)
            if np.allclose(number, HEAD**-0.5):
                program.store(view, times(THOUSANDTH)(number))
                return
    raise NoPlaceError("no query is scaled")


def _gate_skipped(program: Program) -> None:
    """gate(x) * up(x) without the gate's sigmoid."""
    graph = program.graph
    gate = graph.nodes("Sigmoid")[1]
    for found, name in graph.readers(gate.output_id):
        other = found.input1_id if name == "input2_id" else found.input2_id
        graph.bypass(found, "input1_id" if other == found.input1_id else "input2_id")
        return


def _channels_reversed(numbers: Any) -> Any:
    """Of a convolution's weight [O,kH,kW,I]."""
    return np.flip(numbers, -1)


def _heads_permuted(numbers: Any) -> Any:
    """Columns of the output projection, by heads."""
    columns = np.arange(numbers.shape[1]).reshape(-1, HEAD)
    columns[[0, -1]] = columns[[-1, 0]]
    return numbers[:, columns.reshape(-1)]


def _integer_convolution(graph: Graph) -> Table:
    """In the middle of those whose weights are integers."""
    found = [
        one for one in graph.convolutions() if "quant_params" in graph.values[one.filter_id].fields
    ]
    if not found:
        raise NoPlaceError("no convolution has integers")
    return found[len(found) // 2]


def _twins(program: Program) -> None:
    """Two convolutions whose weights have one shape."""
    graph = program.graph
    seen: dict[tuple[int, ...], Table] = {}
    for one in graph.convolutions()[20:]:
        other = seen.setdefault(tuple(graph.tensor(one.filter_id).dims), one)
        if other.filter_id != one.filter_id:
            graph.put(one, filter_id=other.filter_id)
            graph.put(other, filter_id=one.filter_id)
            return
    raise NoPlaceError("no two convolutions have one shape")


def _padding(program: Program) -> None:
    graph = program.graph
    first = graph.convolutions()[0]
    graph.put(first, padding_top=0, padding_left=0, padding_bottom=2, padding_right=2)


def _range(scale: float = 1.0, zero_point: int = 0) -> Change:
    """Of a static range in the middle of the tower."""

    def altered(program: Program) -> None:
        graph = program.graph
        found = [one.quant_params for one in graph.values.values() if "quant_params" in one.fields]
        ranges = [one for one in found if one is not None and one.kind == "PerTensorQuant"]
        if not ranges:
            raise NoPlaceError("there are no static ranges")
        one = ranges[len(ranges) // 2]
        if zero_point:
            graph.put(one, zero_point=(one.zero_point + zero_point) & 0xFFFFFFFF)
        else:
            graph.put(one, scale=one.scale * scale)

    return altered


def _table(dtype: Any, change: ChangeNumbers) -> Change:
    """Other numbers in the embedding table."""

    def altered(program: Program) -> None:
        table = program.tensors(WORDS, WIDTH)[0]
        numbers = np.frombuffer(table.data, dtype).reshape(WORDS, WIDTH)  # type: ignore[arg-type]
        program.store(table.data, change(numbers))  # type: ignore[arg-type]

    return altered


def _row_scales(change: ChangeNumbers) -> Change:
    """Other numbers in the scales of its rows."""

    def altered(program: Program) -> None:
        table = program.tensors(WORDS, 1)[0]
        program.store(table.data, change(np.frombuffer(table.data, np.float32)))  # type: ignore[arg-type]

    return altered
