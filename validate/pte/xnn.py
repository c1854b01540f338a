"""XNNPACK's delegates, computed from their serialized graphs without rounding."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...targets.executorch_types import Delegate
from ...targets.executorch_xnn import check_constants, xnn_table
from .errors import FAILURES, RefusedError, refused
from .xnn_nodes import Node, compile_node
from .xnn_values import INPUT, LIMITS, OUTPUT, Value, read_value


class _Step(NamedTuple):
    where: str
    compute: Callable[..., Tensor]
    read: list[int]
    made: int
    dead: list[int]
    """Values that nothing reads any more."""


class XnnDelegate:
    """A delegate that is run on its arguments, of the sizes that a call has.

    Raises ExportError, here and when it is run, for what is damaged or beyond it.
    """

    def __init__(self, delegate: Delegate, where: str) -> None:
        check_constants(delegate)
        self._where = where
        try:
            self._compile(xnn_table(delegate), delegate)
        except FAILURES as error:
            raise refused(where, error) from error

    def _compile(self, graph: Any, delegate: Delegate) -> None:
        values: dict[int, Value] = {}
        for entry in graph.xvalues:
            value = read_value(delegate, graph, entry)
            if value.index in values:
                raise RefusedError(f"it has two values {value.index}")
            values[value.index] = value
        self._inputs = _arguments(values, INPUT, graph.input_ids)
        self._outputs = _arguments(values, OUTPUT, graph.output_ids)
        places = [value.argument for value in (*self._inputs, *self._outputs)]
        if len(set(places)) < len(places) or not set(places) <= set(range(len(delegate.tensors))):
            raise RefusedError(f"its arguments are {places} of {len(delegate.tensors)}")
        self._constants = {
            value.index: value.constant
            for value in values.values()
            if value.constant is not None and value.kind not in ("qint32", "qcint32")
        }
        self._steps = self._ordered(graph, values)

    def _ordered(self, graph: Any, values: dict[int, Value]) -> list[_Step]:
        known = {value.index for value in self._inputs} | set(self._constants)
        kept = {value.index for value in self._outputs} | known
        steps: list[_Step] = []
        for number, entry in enumerate(graph.xnodes):
            node = Node(entry, values)
            where = f"{self._where}, node {number} ({node.kind})"
            try:
                compute, read = compile_node(node)
                made = node.value("output_id").index
                unmade = [one.index for one in read if one.index not in known]
                if unmade or made in known:
                    raise RefusedError(f"it reads {unmade} too early, or makes {made} again")
            except FAILURES as error:
                raise refused(where, error) from error
            known.add(made)
            steps.append(_Step(where, compute, [one.index for one in read], made, []))
        missing = [value.index for value in self._outputs if value.index not in known]
        if missing:
            raise RefusedError(f"nothing makes its outputs {missing}")
        last = {index: step for step in steps for index in (step.made, *step.read)}
        for index, step in last.items():
            if index not in kept:
                step.dead.append(index)
        return steps

    def __call__(self, arguments: Sequence[Tensor]) -> dict[int, Tensor]:
        """Arguments as they lie in memory -> argument number -> output, as it lies in memory."""
        env: dict[int, Tensor] = dict(self._constants)
        for value in self._inputs:
            env[value.index] = _real(arguments[value.argument], value)
        for step in self._steps:
            try:
                env[step.made] = step.compute(*[env[index] for index in step.read])
            except FAILURES as error:
                raise refused(step.where, error) from error
            for index in step.dead:
                del env[index]
        return {value.argument: _stored(env[value.index], value) for value in self._outputs}


def _arguments(values: dict[int, Value], flag: int, named: Sequence[int]) -> list[Value]:
    found = [value for value in values.values() if value.flags == flag]
    if {value.index for value in found} != set(named):
        raise RefusedError(f"it names the arguments {sorted(named)} and marks others")
    for value in found:
        if value.kind != "fp32" and value.kind not in LIMITS:
            raise RefusedError(f"its argument {value.argument} is {value.kind}")
    return found


def _real(x: Tensor, value: Value) -> Tensor:
    """An argument as real numbers; integers may have fractions."""
    if not isinstance(value.scale, float):
        return x
    return (x.float() - value.zero_point) * value.scale


def _stored(x: Tensor, value: Value) -> Tensor:
    return x if not isinstance(value.scale, float) else x / value.scale + value.zero_point
