"""The decoder's attention on Core ML states.

What an ExportedProgram has as `fastvlm::cached_attention`, with the cache as inputs and outputs,
becomes: RoPE at `position`, a slice of the states replaced in place, and attention over the whole
capacity under a mask that is computed from `position` itself. A row sees the keys at its own
position and before, so what padding wrote behind it, or an earlier answer left there, is never
read before it is replaced.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from ..exporter.config import DecoderConfig
from ..quantize.quiet import quiet_import
from .coreml_lowering import (
    LAST,
    Translation,
    Translator,
    Var,
    mil_type,
    numpy,
    numpy_type,
    traced_type,
)
from .coreml_model import KEY_CACHE, KEY_REST, VALUE_CACHE, VALUE_REST
from .coreml_stored import as_long

with quiet_import():
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813 - its name everywhere
    from coremltools.converters.mil.mil import types

HIDDEN = -40000.0
"""Added to the scores of keys that a row must not see: fp16 has it, and its exponential is 0."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The positions of new rows: from `start` [1] up to `end` [1], all of them in `each` [S].

    `seeing` [G*S] repeats them for the G query heads that share a key head and lie one behind the
    other. `size` is S; -1 where it may be any.
    """

    start: Var
    end: Var
    each: Var
    seeing: Var
    size: int


def rows_from(position: Var, size: int, group: int) -> Rows:
    """`size` rows, the first of them at `position` [1]."""
    steps = np.arange(size, dtype=np.int32)
    return Rows(
        start=position,
        end=mb.add(x=position, y=np.int32(size), name="end"),
        each=mb.add(x=position, y=steps, name="rows"),
        seeing=mb.add(x=position, y=np.tile(steps, group), name="seeing"),
        size=size,
    )


def rows_at(positions: Var, group: int) -> Rows:
    """Any number of rows at `positions` [S], which follow one another."""
    start = mb.slice_by_index(x=positions, begin=[0], end=[1])
    return Rows(
        start=start,
        end=mb.add(x=start, y=mb.shape(x=positions), name="end"),
        each=positions,
        seeing=mb.tile(x=positions, reps=[group], name="seeing"),
        size=-1,
    )


class Cache:
    """States of one function, and where in them it puts new rows."""

    def __init__(
        self, config: DecoderConfig, states: Mapping[str, Var], rows: Rows, capacity: int
    ) -> None:
        self.config = config
        self.states = states
        self.values = {name: mb.read_state(input=state) for name, state in states.items()}
        self.rows, self.size, self.capacity = rows, rows.size, capacity
        self.layer = 0
        self._made: dict[Any, Var] = {}
        keys = np.arange(capacity, dtype=np.int32)[None]
        self.hidden = mb.greater(x=keys, y=mb.expand_dims(x=rows.seeing, axes=[1]), name="hidden")

    def mask(self, dtype: torch.dtype) -> Var:
        """[G*S,capacity]: 0 where a row may look, else `HIDDEN`."""
        if ("mask", dtype) not in self._made:
            ones = mb.cast(x=self.hidden, dtype=types.builtin_to_string(mil_type(dtype)))
            self._made["mask", dtype] = mb.mul(x=ones, y=numpy_type(dtype)(HIDDEN), name="mask")
        return self._made["mask", dtype]

    def angles(self, name: str, table: Tensor, dtype: torch.dtype) -> Var:
        """The new rows of a rotary table [context,d/2]."""
        if (name, dtype) not in self._made:
            whole = numpy(as_long(table, self.capacity).to(dtype))
            self._made[name, dtype] = mb.gather(x=whole, indices=self.rows.each, axis=0, name=name)
        return self._made[name, dtype]

    def append(self, name: str, rest: str, new: Var) -> Var:
        """Store new rows [1,KV,S,d] of the current layer; returns all of its rows."""
        half = new if new.dtype == types.fp16 else mb.cast(x=new, dtype="fp16")
        whole = self._replace(name, half)
        if new.dtype == types.fp16:
            return whole
        whole = mb.cast(x=whole, dtype="fp32")
        if rest not in self.states:  # a float16 cache that is computed on in float32
            return whole
        cut = mb.sub(x=new, y=mb.cast(x=half, dtype="fp32"))
        return mb.add(
            x=whole, y=mb.cast(x=self._replace(rest, mb.cast(x=cut, dtype="fp16")), dtype="fp32")
        )

    def _replace(self, name: str, new: Var) -> Var:
        layer, config = self.layer, self.config
        changed = mb.slice_update(
            x=self.values[name],
            update=mb.expand_dims(x=new, axes=[0]),
            begin=mb.concat(values=[[layer, 0, 0], self.rows.start, [0]], axis=0),
            end=mb.concat(
                values=[[layer + 1, 1, config.kv_heads], self.rows.end, [config.head_dim]], axis=0
            ),
        )
        self.values[name] = mb.coreml_update_state(state=self.states[name], value=changed)
        return mb.slice_by_index(
            x=self.values[name],
            begin=[layer, 0, 0, 0, 0],
            end=[layer + 1, 1, config.kv_heads, self.capacity, config.head_dim],
            squeeze_mask=[True, False, False, False, False],
        )


def translations(cache: Cache, length: Var | None) -> dict[str, Translation]:
    """Of the operators that need to know about states; `length` None: the only row is the last."""

    def attention(t: Translator, node: Node) -> tuple[Var, None, None]:
        return _attention(t, node, cache), None, None

    def last(t: Translator, node: Node) -> Var:
        return _last_row(t, node, length)

    return {"fastvlm.cached_attention.default": attention, "aten.slice.Tensor": last}


def _attention(t: Translator, node: Node, cache: Cache) -> Var:
    config, size = cache.config, cache.size
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
    dtype = traced_type(node.args[0])  # type: ignore[arg-type]
    query, key, value = (
        mb.transpose(
            x=mb.reshape(x=t.var(x, dtype), shape=[1, size, number, width]), perm=[0, 2, 1, 3]
        )
        for x, number in zip(node.args[:3], (heads, kv_heads, kv_heads), strict=True)
    )
    cos, sin = (
        cache.angles(name, t.tensor(table), dtype)
        for name, table in zip(("cos", "sin"), node.args[6:8], strict=True)
    )
    keys = cache.append(KEY_CACHE, KEY_REST, _rotated(key, cos, sin))
    values = cache.append(VALUE_CACHE, VALUE_REST, value)
    cache.layer += 1
    rows = heads // kv_heads * size if size > 0 else size
    mixed = mb.scaled_dot_product_attention(
        query=mb.reshape(x=_rotated(query, cos, sin), shape=[1, kv_heads, rows, width]),
        key=keys,
        value=values,
        attn_mask=cache.mask(dtype),
    )
    mixed = mb.reshape(x=mixed, shape=[1, heads, size, width])
    mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3])
    return mb.reshape(x=mixed, shape=[1, size, heads * width], name=node.name)


def _rotated(x: Var, cos: Var, sin: Var) -> Var:
    """`exporter.model.attention_op.rotate` of [1,H,S,d] by [S,d/2]."""
    first, second = mb.split(x=x, num_splits=2, axis=-1)
    return mb.concat(
        values=[
            mb.sub(x=mb.mul(x=first, y=cos), y=mb.mul(x=second, y=sin)),
            mb.add(x=mb.mul(x=second, y=cos), y=mb.mul(x=first, y=sin)),
        ],
        axis=-1,
    )


def _last_row(t: Translator, node: Node, length: Var | None) -> Var:
    """`x[:, -1:]` of the rows that count; the other slices in a decoder are of everything."""
    x, axis, start, end = node.args
    if (start, end) == (0, LAST):
        return t.var(x)
    if (axis, start, end) != (1, -1, LAST):
        raise NotImplementedError(f"{node.format_node()}")
    if length is None:
        return t.var(x)
    index = mb.sub(x=length, y=np.int32(1), name="last")
    return mb.gather(x=t.var(x), indices=index, axis=1, name=node.name)
