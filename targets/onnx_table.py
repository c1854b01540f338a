"""One copy of a quantized table for two graphs: the embedding reads the bytes of the head.

The head's product wants [D,V], so the embedding gathers columns of it. Both files then name one
region of the decoder's last data file, which holds nothing else: a client that loads data files by
name, as a browser does, need not load the decoder for it.
"""

import numpy as np
import onnx_ir as ir

from .onnx_build import Builder, values_of


def share(embedding: ir.Model, decoder: ir.Model) -> tuple[ir.Value, ir.Value] | None:
    """Let the embedding gather from the head's layout where both hold the same integers.

    Returns the two initializers, the embedding's and the decoder's; None where nothing is shared.
    """
    gather = next((n for n in embedding.graph if _holds_bytes(n, "Gather", 0)), None)
    if gather is None or gather.inputs[0] is None:
        return None
    table = gather.inputs[0]
    rows = values_of(table)
    for node in decoder.graph:
        head = node.inputs[1] if _holds_bytes(node, "MatMulInteger", 1) else None
        if head is None or head.shape != ir.Shape(rows.shape[::-1]):
            continue
        if np.array_equal(values_of(head).T, rows):
            return _gather_columns(embedding, gather, head), head
    return None


def _holds_bytes(node: ir.Node, op_type: str, index: int) -> bool:
    value = node.inputs[index] if node.op_type == op_type else None
    return value is not None and value.is_initializer() and value.dtype == ir.DataType.INT8


def _gather_columns(embedding: ir.Model, gather: ir.Node, head: ir.Value) -> ir.Value:
    """Gather of rows -> Gather of columns [D,B,S], then [B,S,D]."""
    rows, ids = gather.inputs
    if head.const_value is None or rows is None:
        raise ValueError("the table has no values")
    builder = Builder(embedding.graph, gather)
    columns = builder.weight(head.const_value)
    found = builder.op("Gather", columns, ids, axis=1)
    builder.replace(builder.op("Transpose", found, perm=[1, 2, 0]))
    del embedding.graph.initializers[str(rows.name)]
    for index, node in enumerate(embedding.graph):
        node.name = f"{node.op_type}_{index}"
    return columns


def refer(table: ir.Value, stored: ir.Value) -> None:
    """Point the table at where the other graph's file says that its bytes are."""
    place = stored.const_value
    if not isinstance(place, ir.ExternalTensor):
        raise TypeError(f"{stored.name} is not in a data file")
    table.const_value = place
