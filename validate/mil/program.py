"""Compile one function of a package: its operations become kernels on numbered slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import constexpr, kernels
from .errors import damaged, foreign
from .node import Call, Node, Ref, wrapper
from .numbers import round_half
from .package import Package
from .states import plan_memory
from .values import Constant, Type, is_text, parse_type, parse_value, text

_CANNOT_BE = "has parameters that cannot be"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation, compiled. `store` rounds a result; `dead` slots hold nothing needed later.

    `node` is for errors, `types` what the results must be.
    """

    node: Node
    run: Callable[..., Any]
    operands: tuple[int, ...]
    results: tuple[int, ...]
    types: tuple[Type, ...]
    stores: tuple[Callable[[Tensor], Tensor] | None, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function.

    A run starts from a copy of `slots` (the constants), puts the inputs and states into theirs
    and makes the `steps`; then the outputs lie in theirs.
    """

    steps: tuple[Step, ...]
    slots: Sequence[Tensor | None]
    inputs: dict[str, Ref]
    states: dict[str, Ref]
    outputs: dict[str, Ref]


def compile_function(package: Package, function: str, *, exact: bool) -> Program:
    """Raises ExportError for an unknown function or operation, and what cannot be read."""
    functions = package.spec.mlProgram.functions
    if function not in functions:
        have = ", ".join(package.functions) or "none"
        raise foreign(package.path, f"has no function {function!r}; it has {have}")
    message = functions[function]
    if message.opset not in message.block_specializations:
        raise damaged(package.model_path, f"has no operations for {message.opset!r}")
    opset = int(message.opset.removeprefix("CoreML")) if message.opset[6:].isdecimal() else 0
    compiler = _Compiler(package, function, exact=exact, opset=opset)
    for argument in message.inputs:
        compiler.add_input(argument.name, parse_type(package, argument.type))
    block = message.block_specializations[message.opset]
    for operation in block.operations:
        compiler.add(operation)
    return compiler.finish(list(block.outputs))


class _Compiler:
    """Gives every tensor a slot, operation by operation."""

    def __init__(self, package: Package, function: str, *, exact: bool, opset: int) -> None:
        self._package = package
        self._opset = opset
        self._exact = exact
        self._place = f"{package.path}, function {function!r}"
        self._names: dict[str, Ref | str] = {}
        self._slots: list[Ref] = []
        self._inputs: dict[str, Ref] = {}
        self._calls: list[Call] = []

    def add_input(self, name: str, type_: Type) -> None:
        self._inputs[name] = self._define(name, type_)

    def add(self, message: Any) -> None:
        """Compile one Operation message."""
        if message.type == "const":
            if len(message.outputs) != 1 or "val" not in message.attributes:
                raise damaged(self._package.model_path, "holds a constant of no value")
            self._names[message.outputs[0].name] = self._value(
                message.outputs[0].name, message.attributes["val"]
            )
            return
        node = self._node(message)
        if message.blocks:
            raise node.error("runs blocks of operations, which the interpreter does not")
        constant = constexpr.OPERATIONS.get(node.kind)
        if constant is not None:
            with node.blamed(_CANNOT_BE):
                made = constant(node)
            for (name, _), result in zip(node.outputs, made, strict=True):
                self._define(name, result.type, result)
            return
        operation = kernels.OPERATIONS.get(node.kind)
        if operation is None:
            raise node.error("is no operation that the interpreter knows")
        with node.blamed(_CANNOT_BE):
            kernel = operation(node)
        results = tuple(self._define(name, type_) for name, type_ in node.outputs)
        self._calls.append(Call(node=node, kernel=kernel, results=results))

    def finish(self, outputs: list[str]) -> Program:
        """Order is the file's; what remains is where slots die and what is written in place."""
        refs = {name: self._tensor(name) for name in outputs}
        kept = {ref.slot for ref in refs.values()}
        calls = plan_memory(self._calls, kept)
        used = {ref.slot for call in calls for ref in call.kernel.operands} | kept
        immortal = kept | {
            ref.slot for ref in self._slots if ref.constant is not None or ref.type.state
        }
        last: dict[int, int] = {}
        for at, call in enumerate(calls):
            last |= {ref.slot: at for ref in (*call.kernel.operands, *call.results)}
        dead: dict[int, list[int]] = {}
        for slot in last.keys() - immortal:
            dead.setdefault(last[slot], []).append(slot)
        return Program(
            steps=tuple(_step(call, tuple(dead.get(at, ()))) for at, call in enumerate(calls)),
            slots=[
                ref.constant.tensor() if ref.constant is not None and ref.slot in used else None
                for ref in self._slots
            ],
            inputs={name: ref for name, ref in self._inputs.items() if not ref.type.state},
            states={name: ref for name, ref in self._inputs.items() if ref.type.state},
            outputs=refs,
        )

    def _define(self, name: str, type_: Type, constant: Constant | None = None) -> Ref:
        ref = Ref(slot=len(self._slots), name=name, type=type_, constant=constant)
        self._slots.append(ref)
        self._names[name] = ref
        return ref

    def _value(self, name: str, message: Any) -> Ref | str:
        if is_text(message):
            return text(self._package, message)
        constant = parse_value(self._package, message)
        ref = Ref(slot=len(self._slots), name=name, type=constant.type, constant=constant)
        self._slots.append(ref)
        return ref

    def _tensor(self, name: str) -> Ref:
        ref = self._names.get(name)
        if not isinstance(ref, Ref):
            raise damaged(self._package.model_path, f"uses {name!r}, which nothing makes")
        return ref

    def _binding(self, binding: Any) -> Ref | str:
        if binding.WhichOneof("binding") == "value":
            return self._value("", binding.value)
        found = self._names.get(binding.name)
        return found if isinstance(found, str) else self._tensor(binding.name)

    def _node(self, message: Any) -> Node:
        inputs: dict[str, Sequence[Ref | str]] = {
            name: [self._binding(binding) for binding in argument.arguments]
            for name, argument in message.inputs.items()
        }
        # Operations before iOS 18 have their constants as attributes.
        for name, value in message.attributes.items():
            if name != "name":
                inputs.setdefault(name, [self._value("", value)])
        return Node(
            message.type,
            self._place,
            inputs,
            [(output.name, parse_type(self._package, output.type)) for output in message.outputs],
            exact=self._exact,
            opset=self._opset,
            package=self._package,
        )


def _step(call: Call, dead: tuple[int, ...]) -> Step:
    return Step(
        node=call.node,
        run=call.kernel.run,
        operands=tuple(ref.slot for ref in call.kernel.operands),
        results=tuple(ref.slot for ref in call.results),
        types=tuple(ref.type for ref in call.results),
        stores=tuple(_store(call, ref.type) for ref in call.results),
        dead=dead,
    )


def _store(call: Call, type_: Type) -> Callable[[Tensor], Tensor] | None:
    """What brings a result to its declared type, where its kernel leaves that to do."""
    if not call.kernel.rounds:
        return None
    if not type_.dtype.is_float:
        return wrapper(type_)
    return round_half if type_.dtype.name == "fp16" and not call.node.exact else None
