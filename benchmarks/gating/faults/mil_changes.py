"""Faults in Core ML packages: changes of one `Function` each."""

from .base import NoPlaceError
from .mil import Change, Function
from .numbers import THOUSANDTH, ChangeNumbers, times


def output_scaled(kind: str, index: int, factor: float = THOUSANDTH) -> Change:
    """What an operation gives, times a factor."""
    return lambda function: function.scale(function.operations(kind)[index], factor)


def overflowing(kind: str, index: int) -> Change:
    """Times 2^26 and back: harmless to real numbers, infinite in float16."""

    def change(function: Function) -> None:
        function.scale(function.operations(kind)[index], 8192.0, 8192.0, 1 / 8192.0, 1 / 8192.0)

    return change


def gelu_by_tanh(*indices: int) -> Change:
    """The approximation in the place of some, or (no index) of all."""

    def change(function: Function) -> None:
        found = function.operations("gelu")
        for op in [found[index] for index in indices] or found:
            value = function.value_of(op, "mode")
            value.immediateValue.tensor.strings.values[0] = "TANH_APPROXIMATION"

    return change


def constant(kind: str, index: int, name: str, change: ChangeNumbers) -> Change:
    """Other numbers in a constant of an operation; those who share it read them, too."""

    def altered(function: Function) -> None:
        value = function.value_of(function.operations(kind)[index], name)
        function.store(value, change(function.numbers(value)))

    return altered


def static_range(name: str, change: ChangeNumbers) -> Change:
    """Of a static range, where it is rounded to and where it is made a float again."""

    def altered(function: Function) -> None:
        rounds = function.operations("quantize")[11]
        for op in (rounds, *function.operations("dequantize")):
            if op is rounds or function.source(op, "input") == rounds.outputs[0].name:
                value = function.value_of(op, name)
                function.store(value, change(function.numbers(value)))

    return altered


def epsilon(index: int, factor: float) -> Change:
    """What is added to the mean square before its root is taken."""

    def change(function: Function) -> None:
        root = function.operations("rsqrt")[index]
        added = function.makers[function.source(root, "x")]
        for name in ("x", "y"):
            maker = function.makers.get(function.source(added, name))
            if maker is not None and maker.type == "const":
                value = maker.attributes["val"]
                function.store(value, times(factor)(function.numbers(value)))
                return
        raise NoPlaceError("the norm has no epsilon of its own")

    return change


def inputs_swapped(kind: str, index: int, first: str, second: str) -> Change:
    """Two inputs of an operation in each other's places."""

    def change(function: Function) -> None:
        op = function.operations(kind)[index]
        one, other = function.source(op, first), function.source(op, second)
        function.read(op, first, other)
        function.read(op, second, one)

    return change


def read_each_other(kind: str, first: int, second: int, name: str) -> Change:
    """Two operations read each other's constants."""

    def change(function: Function) -> None:
        found = function.operations(kind)
        one, other = found[first], found[second]
        if one.inputs[name].arguments[0].name:
            source, another = function.source(one, name), function.source(other, name)
            function.read(one, name, another)
            function.read(other, name, source)
            return
        kept = type(one.inputs[name])()
        kept.CopyFrom(one.inputs[name])
        one.inputs[name].CopyFrom(other.inputs[name])
        other.inputs[name].CopyFrom(kept)

    return change


def bypassed(kind: str, index: int, name: str) -> Change:
    """An operation that hands one of its inputs on."""
    return lambda function: function.bypass(function.operations(kind)[index], name)


def another_kind(kind: str, index: int, other: str) -> Change:
    """Another operation on the same inputs."""

    def change(function: Function) -> None:
        function.operations(kind)[index].type = other

    return change
