"""ONNX graphs for parsers that lack operators of opsets 23 and 24: the same in older ones.

TensorRT's parser has Attention since 10.14, and RotaryEmbedding, RMSNormalization and TensorScatter
since 10.15. Where it lacks one, the nodes of that operator are written out in memory, in the same
types; the file stays as it is, and weights stay in their data files. A node that is written for
another is named after it: NODE/Where is of NODE.

onnx.inliner would write 16 nodes for a RMSNormalization, 30 for a RotaryEmbedding and 73 for an
Attention, shapes read at run time among them and without names; TensorScatter it can't write.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_ir.passes import common

from ..exporter.errors import ExportError
from .onnx_build import Builder, values_of
from .tensorrt_lacking import UNCHANGED, Older
from .tensorrt_package import NO_FUSED_ATTENTION
from .tensorrt_plan import HINT

OLDEST = 21
"""The opset that all else in the graphs needs: integers of 4 bits in groups."""

HIDDEN = np.float32(-3.0e38)
"""A score that no softmax gives a share: beyond any real one, and finite, as -inf - -inf is NaN."""

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def without(path: Path, operators: Collection[str]) -> Older:
    """The graph in the file, every node of these operators (of OPERATORS) written out.

    Raises ExportError for a file that is no ONNX graph, or has a node of a form that is not ours.
    """
    if not operators:
        return UNCHANGED
    try:
        model = ir.load(path)
        common.ShapeInferencePass(strict_mode=False)(model)
    except (OSError, ValueError, DecodeError) as error:
        raise ExportError(f"{path.name} can't be read: {error}", HINT) from error
    nodes = [node for node in model.graph if not node.domain and node.op_type in operators]
    if not nodes:
        return UNCHANGED
    rewrite = _Rewrite(model.graph)
    for node in nodes:
        rewrite.write(node)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None  # a parser infers its own
    _lower_opset(model)
    return Older(
        model=ir.to_proto(model).SerializeToString(deterministic=True),
        origins=rewrite.origins,
        counts=dict(sorted(Counter(node.op_type for node in nodes).items())),
        float32=rewrite.float32,
    )


class _Rewrite:
    """What has been written so far, and what of it several nodes share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.origins: dict[str, str] = {}
        self.float32: dict[str, str] = {}
        self.shared: dict[tuple[object, ...], tuple[ir.Value, ...]] = {}

    def write(self, node: ir.Node) -> None:
        """Put other operators in the node's place."""
        name = str(node.name)
        builder = Builder(self.graph, node)
        out = OPERATORS[node.op_type](self, builder, node)
        found: Counter[str] = Counter()
        for new in builder.tape.nodes:
            found[new.op_type] += 1
            number = f"_{found[new.op_type]}" if found[new.op_type] > 1 else ""
            new.name = f"{name}/{new.op_type}{number}"
            new.outputs[0].name = f"{new.name}.out"
            self.origins[new.name] = name
        builder.replace(out)

    def once(
        self, key: tuple[object, ...], make: Callable[[], tuple[ir.Value, ...]]
    ) -> tuple[ir.Value, ...]:
        """What `make` writes; the second time for a key what was written the first time."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]


def _scatter(rewrite: _Rewrite, b: Builder, node: ir.Node) -> ir.Value:
    """present[c] = update[c - place] for place <= c < place + S, else past[c]; along axis 2.

    Nothing is written in place: past and present are two buffers.
    """
    past, update, place = _inputs(node, 3)
    _only(node, axis=2, mode="linear")
    length = _size(node, past, 2)
    new = _dims(node, update)[2]

    def places() -> tuple[ir.Value, ...]:
        """Which positions are new [1,1,C,1], and which row of the update goes there [C]."""
        positions = ir.tensor(np.arange(length), name=f"constant.positions.{length}")
        count = b.op("Shape", update, start=2, end=3)
        offset = b.op("Sub", b.weight(positions), place)
        zero, one = b.constant(np.array([0])), b.constant(np.array([1]))
        begun = b.op("GreaterOrEqual", offset, zero)
        fresh = b.op("And", begun, b.op("Less", offset, count))
        row = b.op("Min", b.op("Max", offset, zero), b.op("Sub", count, one))
        return b.op("Unsqueeze", fresh, b.constant(np.array([0, 1, 3]))), row

    known = isinstance(new, int) or new.value is not None
    fresh, row = rewrite.once(("place", place, length, str(new) if known else update), places)
    return b.op("Where", fresh, b.op("Gather", update, row, axis=2), past)


def _rotary(rewrite: _Rewrite, b: Builder, node: ir.Node) -> ir.Value:
    """[x1 cos - x2 sin, x1 sin + x2 cos] of the halves of each head, x [1,H,S,d]."""
    x, cos, sin, positions = _inputs(node, 4)
    _only(node, interleaved=0, rotary_embedding_dim=0, num_heads=0)
    head_dim = _size(node, x, 3)

    def angles() -> tuple[ir.Value, ...]:
        """cos and sin at the positions [1,1,S,d/2]."""
        heads = b.constant(np.array([1]))
        tables = (b.op("Gather", table, positions, axis=0) for table in (cos, sin))
        return tuple(b.op("Unsqueeze", table, heads) for table in tables)

    cos_rows, sin_rows = rewrite.once(("angles", cos, sin, positions), angles)
    start, middle, end, axis = (
        b.constant(np.array([number])) for number in (0, head_dim // 2, head_dim, 3)
    )
    first, second = b.op("Slice", x, start, middle, axis), b.op("Slice", x, middle, end, axis)
    left = b.op("Sub", b.op("Mul", first, cos_rows), b.op("Mul", second, sin_rows))
    right = b.op("Add", b.op("Mul", first, sin_rows), b.op("Mul", second, cos_rows))
    return b.op("Concat", left, right, axis=-1)


def _rms_norm(rewrite: _Rewrite, b: Builder, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon), statistics in float32 and rounded to x's type; times scale."""
    x, scale = _inputs(node, 2)
    epsilon = _only(node, axis=-1, stash_type=1, epsilon=None).get("epsilon", 1e-5)
    wide = _wide(b, x)
    mean = b.op("ReduceMean", b.op("Mul", wide, wide), b.constant(np.array([-1])), keepdims=1)
    size = b.op("Sqrt", b.op("Add", mean, b.constant(np.float32(epsilon))))
    return b.op("Mul", _narrowed(b, b.op("Div", wide, size), x), scale)


def _attention(rewrite: _Rewrite, b: Builder, node: ir.Node) -> ir.Value:
    """softmax(query key' / sqrt(d)) value in float32, query [1,H,S,d], the others [1,KV,A,d].

    Heads that share a key are rows of one matrix product with it, so that no key is repeated.
    """
    query, key, value, *masks = _inputs(node, 3, 4)
    _only(node, is_causal=0, qk_matmul_output_mode=0, softcap=0.0)
    heads, head_dim, kv_heads = _size(node, query, 1), _size(node, query, 3), _size(node, key, 1)
    if query.dtype in HALVES:
        rewrite.float32[str(node.name)] = NO_FUSED_ATTENTION
    q, k, v = (_wide(b, x) for x in (query, key, value))
    q = b.op("Mul", q, b.constant(np.float32(head_dim**-0.5)))
    k = b.op("Transpose", k, perm=[0, 1, 3, 2])
    if grouped := heads != kv_heads:
        apart = np.array([1, kv_heads, heads // kv_heads, -1, head_dim])
        q, axis = b.op("Reshape", q, b.constant(apart)), b.constant(np.array([2]))
        k, v = b.op("Unsqueeze", k, axis), b.op("Unsqueeze", v, axis)
    scores = b.op("MatMul", q, k)
    if masks:
        if masks[0].dtype is not ir.DataType.BOOL:
            raise _foreign(node, f"a mask of {masks[0].dtype}")
        scores = b.op("Where", masks[0], scores, b.constant(HIDDEN))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    if grouped:
        mixed = b.op("Reshape", mixed, b.constant(np.array([1, heads, -1, head_dim])))
    return _narrowed(b, mixed, query)


OPERATORS: Mapping[str, Callable[[_Rewrite, Builder, ir.Node], ir.Value]] = {
    "TensorScatter": _scatter,
    "RotaryEmbedding": _rotary,
    "RMSNormalization": _rms_norm,
    "Attention": _attention,
}
"""Operator -> what writes a node of it in older ones."""


def _wide(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Cast", x, to=int(ir.DataType.FLOAT)) if x.dtype in HALVES else x


def _narrowed(b: Builder, x: ir.Value, like: ir.Value) -> ir.Value:
    """x, which is float32, in the type of `like`."""
    return b.op("Cast", x, to=int(like.dtype)) if like.dtype in HALVES else x


def _inputs(node: ir.Node, least: int, most: int = 0) -> list[ir.Value]:
    """A node's inputs. Raises ExportError where one is left out, or there are others than these."""
    given = [value for value in node.inputs if value is not None]
    outputs = [value for value in node.outputs if value.name]
    typed = all(value.dtype is not None for value in given)
    whole = len(given) == len(node.inputs) and len(outputs) == 1
    if not typed or not whole or not least <= len(given) <= max(least, most):
        raise _foreign(node, f"{len(given)} inputs and {len(outputs)} outputs")
    return given


def _only(node: ir.Node, **known: object) -> dict[str, float]:
    """A node's attributes. Raises ExportError for one that is not known, or not of its one value.

    None: any value will do.
    """
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, value in found.items():
        if name not in known or (known[name] is not None and value != known[name]):
            raise _foreign(node, f"{name} = {value!r}")
    return found


def _dims(node: ir.Node, value: ir.Value) -> ir.Shape:
    if value.shape is None or len(value.shape) != len("BHSD"):
        raise _foreign(node, f"{value.name} of shape {value.shape}")
    return value.shape


def _size(node: ir.Node, value: ir.Value, axis: int) -> int:
    """A size that is known; of what is cut from a tensor along other axes it is the tensor's."""
    cut = value.producer()
    if cut is not None and cut.op_type == "Slice" and axis not in values_of(cut.inputs[3]):
        return _size(node, cut.inputs[0] or value, axis)
    size = _dims(node, value)[axis]
    if not isinstance(size, int):
        raise _foreign(node, f"{value.name} of shape {value.shape}")
    return size


def _foreign(node: ir.Node, what: str) -> ExportError:
    return ExportError(
        f"node '{node.name}' ({node.op_type}) has {what}: it can't be written in older operators.",
        HINT,
    )


def _lower_opset(model: ir.Model) -> None:
    """Import the oldest opset, and the IR version with it, that has all of the graph's operators.

    Between these opsets operators only took on more types and attributes.
    """
    nodes = list(model.graph)
    now = model.graph.opset_imports[""]
    version = next((one for one in range(OLDEST, now) if _has(one, nodes)), now)
    model.graph.opset_imports[""] = version
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.ir_version = min(model.ir_version, least)


def _has(version: int, nodes: Iterable[ir.Node]) -> bool:
    """Whether the opset has operators with these attributes and inputs."""
    for node in nodes:
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return False
        if set(node.attributes) - set(schema.attributes) or len(node.inputs) > schema.max_input:
            return False
    return True
