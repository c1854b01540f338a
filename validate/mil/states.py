"""States, and which updates of slices may overwrite what they update.

A cache is far larger than the rows a run adds to it, so a run must not copy it. Reading a state
gives its own memory, and `read_state -> slice_update -> write_state` writes the slice only. Both
are allowed as long as nobody sees a difference: every other tensor in the same memory has had its
last use. Otherwise the value is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from torch import Tensor

from .node import Call, Kernel, Node


def _read_state(node: Node) -> Kernel:
    return node.kernel(lambda state: state, "input", rounds=False, views=True)


def _write_state(node: Node) -> Kernel:
    def run(state: Tensor, value: Tensor) -> tuple[()]:
        state.copy_(value)
        return ()

    return node.kernel(run, "input", "data", rounds=False)


def _update_state(node: Node) -> Kernel:
    return node.kernel(
        lambda state, value: state.copy_(value), "state", "value", rounds=False, views=True
    )


OPERATIONS: dict[str, Callable[[Node], Kernel]] = {
    "read_state": _read_state,
    "write_state": _write_state,
    "coreml_update_state": _update_state,
}
_WRITES = ("write_state", "coreml_update_state")


def plan_memory(calls: Sequence[Call], outputs: set[int]) -> list[Call]:
    """The same calls, with updates in place where that changes nothing.

    `outputs` are the slots needed after the last call.
    """
    memory = _Memory(calls, outputs)
    planned = list(calls)
    for state in dict.fromkeys(
        call.kernel.operands[0].slot for call in calls if call.node.kind in _WRITES
    ):
        _plan_state(state, calls, memory, planned)
    for at, call in enumerate(planned):
        if call.kernel.in_place is not None and call is calls[at] and memory.is_last(call, at):
            planned[at] = _changed(call, call.kernel.in_place)
            memory.join(call)
    return planned


class _Memory:
    """Which slots share memory, and until when each is used."""

    def __init__(self, calls: Sequence[Call], outputs: set[int]) -> None:
        self.last: dict[int, float] = {}
        self.maker: dict[int, int] = {}
        self._root: dict[int, int] = {}
        self._family: dict[int, set[int]] = {}
        for at, call in enumerate(calls):
            for ref in call.results:
                self.maker[ref.slot] = at
                self.last[ref.slot] = at
                if call.kernel.views:
                    self._join(ref.slot, call.kernel.operands[0].slot)
            for ref in call.kernel.operands:
                self.last[ref.slot] = at
        self.last |= dict.fromkeys(outputs, inf)
        # Constants are shared by programs and by runs, so they are never overwritten.
        self._constant = {
            self.root(ref.slot)
            for call in calls
            for ref in call.kernel.operands
            if ref.constant is not None or ref.type.state
        }

    def root(self, slot: int) -> int:
        """The slot whose memory this one shares."""
        return self._root.get(slot, slot)

    def family(self, slot: int) -> set[int]:
        """All slots in the same memory."""
        root = self.root(slot)
        return self._family.get(root, set()) | {root}

    def _join(self, slot: int, other: int) -> None:
        root = self.root(other)
        members = self.family(slot)
        for member in members:
            self._root[member] = root
        self._family.setdefault(root, set()).update(members)

    def join(self, call: Call) -> None:
        """Note that the call's result now shares its first operand's memory."""
        self._join(call.results[0].slot, call.kernel.operands[0].slot)

    def is_last(self, call: Call, at: int) -> bool:
        """Whether a call may overwrite its first operand: nobody else needs that memory."""
        target, update = call.kernel.operands[:2]
        root = self.root(target.slot)
        return (
            root not in self._constant
            and root in self.maker
            and self.root(update.slot) != root
            and all(self.last[slot] <= at for slot in self.family(root) if self.maker[slot] < at)
        )


@dataclass(frozen=True, kw_only=True)
class _Write:
    """A write of a state: where it is, and the updates of slices that lead to its value."""

    at: int
    updates: tuple[int, ...]


def _plan_state(state: int, calls: Sequence[Call], memory: _Memory, planned: list[Call]) -> None:
    writes = [
        _chain(state, at, calls, memory)
        for at, call in enumerate(calls)
        if call.node.kind in _WRITES and call.kernel.operands[0].slot == state
    ]
    starts = [write.updates[0] if write.updates else write.at for write in writes]
    effective = []
    for write, following in zip(writes, [*starts[1:], inf], strict=True):
        if write.updates and _may_overwrite(write, following, calls, memory):
            for at in write.updates:
                planned[at] = _changed(calls[at], calls[at].kernel.in_place or calls[at].kernel.run)
                memory.join(calls[at])
            planned[write.at] = _changed(calls[write.at], _nothing(calls[write.at]))
            effective.append(write.updates[0])
        else:
            effective.append(write.at)
            planned[write.at] = _changed(calls[write.at], _copying(calls[write.at].kernel.run))
    # A value read before a write and used after it must not change.
    for slot in memory.family(state) - {state}:
        call = planned[memory.maker[slot]]
        made, used = memory.maker[slot], _last_of_views(slot, calls, memory)
        reads = call.node.kind == "read_state" or call.node.kind in _WRITES
        if reads and any(made < at < used for at in effective):
            planned[made] = _changed(call, _cloned(call.kernel.run))


def _chain(state: int, at: int, calls: Sequence[Call], memory: _Memory) -> _Write:
    """The updates between reading a state and writing it at `at`; none if it is not so simple."""
    updates: list[int] = []
    slot = calls[at].kernel.operands[1].slot
    while True:
        made = memory.maker.get(slot)
        if made is None:
            return _Write(at=at, updates=())
        call = calls[made]
        first = call.kernel.operands[0].slot if call.kernel.operands else None
        if call.kernel.in_place is not None and first is not None:
            updates.append(made)
            slot = first
            continue
        is_state = first == state and call.node.kind in ("read_state", "coreml_update_state")
        between = calls[made + 1 : at]
        if not is_state or any(_touches(state, other) for other in between if updates):
            return _Write(at=at, updates=())
        return _Write(at=at, updates=tuple(reversed(updates)))


def _touches(state: int, call: Call) -> bool:
    kinds = (*_WRITES, "read_state")
    return call.node.kind in kinds and call.kernel.operands[0].slot == state


def _may_overwrite(write: _Write, following: float, calls: Sequence[Call], memory: _Memory) -> bool:
    """Whether every value of the chain is used up when the next one overwrites it."""
    ends = [*write.updates[1:], following]
    state = calls[write.at].kernel.operands[0].slot
    first = calls[write.updates[0]].kernel.operands[0].slot
    chain = {first, *(calls[at].results[0].slot for at in write.updates)}
    chain = set().union(*(_views(slot, calls) for slot in chain))
    for at, end in zip(write.updates, ends, strict=True):
        update = calls[at].kernel.operands[1].slot
        if memory.root(update) == memory.root(state) or update in chain:
            return False
        if _last_of_views(calls[at].results[0].slot, calls, memory) > end:
            return False
    return _last_of_views(first, calls, memory) <= write.updates[0]


def _views(slot: int, calls: Sequence[Call]) -> set[int]:
    """The slot and all that are views of it, found in program order."""
    found = {slot}
    for call in calls:
        if call.kernel.views and call.kernel.operands[0].slot in found:
            found |= {ref.slot for ref in call.results}
    return found


def _last_of_views(slot: int, calls: Sequence[Call], memory: _Memory) -> float:
    return max(memory.last.get(view, -1) for view in _views(slot, calls))


def _changed(call: Call, run: Callable[..., object]) -> Call:
    return replace(call, kernel=replace(call.kernel, run=run))


def _nothing(call: Call) -> Callable[..., object]:
    """A write whose value already is the state."""
    if call.node.kind == "write_state":
        return lambda state, value: ()
    return lambda state, value: state


def _copying(write: Callable[..., object]) -> Callable[..., object]:
    """A write whose value may lie in the state's own memory."""

    def run(state: Tensor, value: Tensor) -> object:
        shared = value.untyped_storage().data_ptr() == state.untyped_storage().data_ptr()
        return write(state, value.clone() if shared else value)

    return run


def _cloned(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: read(*operands).clone()
