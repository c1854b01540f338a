"""fp16 that cannot overflow: operators that leave its range on real inputs stay in float32.

fp16 reaches 65504 and keeps 11 bits down to 6e-5. A float32 run finds the largest magnitude at
every operator (`ranges.scan`); those beyond a limit compute in float32 and hand their values on in
float32 as far as the next operator inside the limit, so that no value beyond it is ever stored in
fp16. What the model itself asks in float32 (RMSNorm's statistics, whose eps of 1e-6 is below fp16's
normal range) stays there too: the program is traced from a model in fp16.

Integers stay what they are, and only the floats around them become fp16: an integer layer's scales,
its bias, what its `dequantize` makes and what its `quantize` reads.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..exporter.errors import ExportError
from ..exporter.graphs import Graph, export_program
from .ranges import (
    DEQUANTIZE_TENSOR,
    DEQUANTIZE_WEIGHT,
    LOOKUP,
    QUANTIZE,
    Inputs,
    OpRange,
    lifted,
    scan,
    survives_half,
)
from .retype import CACHE, Widening, rebuilt, traced_in

LARGEST = torch.finfo(torch.float16).max  # 65504


@dataclass(frozen=True, kw_only=True)
class Half:
    """A program in fp16, the operators that stay in float32, and every operator's range.

    Not in `kept`: what the model itself computes in float32.
    """

    program: ExportedProgram
    kept: tuple[OpRange, ...]
    ranges: tuple[OpRange, ...]


def to_half(
    graph: Graph, batches: Sequence[Inputs], limit: float, say: Callable[[str], None]
) -> Half:
    """Trace the graph in fp16, but for operators whose magnitudes on `batches` exceed `limit`.

    pixel_values, image_features, inputs_embeds and logits stay float32, the cache becomes fp16.
    An operator stays in float32, too, where fp16 has not enough digits for its weights, or for the
    scales of its integers.
    `limit` infinity gives the naive conversion. Raises ExportError where float32 itself gives NaN
    or infinity, and where the cache would leave fp16's range.
    """
    wide = export_program(graph)
    ranges = scan(wide, batches, say)
    _refuse_broken(graph.name, ranges)
    _refuse_cache(graph, wide, ranges, limit)
    program = traced_in(graph, torch.float16)
    _check_same(wide, program)
    widening = Widening(graph, program, wide, _names_to_keep(wide, ranges, limit), torch.float16)
    widening.run()
    kept = tuple(r for r in ranges if r.node in widening.kept)
    say(f"{graph.name}: {len(kept)} of {len(ranges)} operators stay in float32")
    return Half(program=rebuilt(program), kept=kept, ranges=ranges)


def _refuse_broken(name: str, ranges: Sequence[OpRange]) -> None:
    broken = [r for r in ranges if not math.isfinite(r.leaving)]
    if broken:
        first = broken[0]
        raise ExportError(
            f"In float32 {len(broken)} operators of the {name} graph already give NaN or infinity, "
            f"first {first.op} ({first.node}) in {first.layer or 'the graph itself'}.",
            "Run `fastvlm-export inspect` on the checkpoint: its weights may be damaged.",
        )


def _refuse_cache(
    graph: Graph, wide: ExportedProgram, ranges: Sequence[OpRange], limit: float
) -> None:
    """The cache is fp16 for every client, so what it cannot hold has nowhere to go."""
    names = dict(zip(wide.graph_signature.user_outputs, graph.outputs, strict=True))
    beyond = [
        f"{names[r.node]} ({r.leaving:.3g})"
        for r in ranges
        if names.get(r.node, "").startswith(CACHE) and r.leaving > max(limit, LARGEST)
    ]
    if beyond:
        raise ExportError(
            f"A cache in fp16 ends at {LARGEST:.0f}, below values of {', '.join(beyond)}.",
            'Use a recipe with float = "fp32".',
        )


def _check_same(wide: ExportedProgram, half: ExportedProgram) -> None:
    """Ranges are matched by name, so both traces must be the same."""
    traces = [[(n.name, str(n.target)) for n in p.graph.nodes] for p in (wide, half)]
    if traces[0] != traces[1]:
        raise RuntimeError("the fp16 trace differs from the float32 one")


def _names_to_keep(wide: ExportedProgram, ranges: Sequence[OpRange], limit: float) -> set[str]:
    """Operators beyond the limit, or with weights or scales that fp16 cannot represent."""
    specs, tensors = wide.graph_signature.input_specs, lifted(wide)
    constants = {spec.arg.name for spec in specs[: len(tensors)]}
    lost = {
        spec.arg.name
        for spec, tensor in zip(specs, tensors, strict=False)
        if math.isfinite(limit) and not survives_half(tensor)
    }
    beyond = {r.node for r in ranges if not r.within(limit)}
    names: set[str] = set()
    for node in wide.graph.nodes:
        # One of several results is where its producer is.
        part = node.target is operator.getitem and node.args[0].name in names
        read = {n.name for n in node.all_input_nodes}
        scale_lost = math.isfinite(limit) and _scale_is_lost(node)
        if part or node.name in beyond or read & lost or scale_lost:
            names.add(node.name)
        if read and read <= constants:
            constants.add(node.name)
            if read & lost:
                lost.add(node.name)  # a view of such weights, or integers by such scales
    return names | _around(wide, names)


def _scale_is_lost(node: Node) -> bool:
    """Whether the operator has an activation's scale that is no number of fp16."""
    if str(node.target) not in (QUANTIZE, DEQUANTIZE_TENSOR):
        return False
    scale = float(node.args[1])  # type: ignore[arg-type]
    return float(torch.tensor(scale, dtype=torch.float16)) != scale


def _around(program: ExportedProgram, names: set[str]) -> set[str]:
    """What rounds to integers behind kept operators, and what makes floats for them alone.

    That goes from and to any type, so that no cast is needed there.
    """
    found = set()
    for node in program.graph.nodes:
        kind, readers = str(node.target), [user.name for user in node.users]
        behind = kind == QUANTIZE and node.args[0].name in names
        before = kind in (DEQUANTIZE_TENSOR, DEQUANTIZE_WEIGHT, LOOKUP)
        if behind or (before and readers and names.issuperset(readers)):
            found.add(node.name)
    return found
