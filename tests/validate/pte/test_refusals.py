"""Programs that are damaged, hostile or beyond the interpreter: one error each, that names why."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.executorch_file import Call, Method, PteFile, parse
from fastvlm_export.targets.executorch_flatbuffer import Table
from fastvlm_export.targets.executorch_model import DECODER, PROGRAM, VISION
from fastvlm_export.validate.pte import Program, xnn

from .recorded import Graph, Recorded


def of_kind(graph: Graph, kind: str) -> Table:
    return next(node for node in graph.nodes if node.kind == kind)


def quantized(graph: Graph, kind: str) -> Table:
    """The first value with such parameters."""
    values = [one for one in graph.values.values() if "quant_params" in one.fields]
    return next(one for one in values if one.quant_params.kind == kind)


def set_to(table: Table, **fields: Any) -> None:
    table.fields.update(fields)


def argument(graph: Graph) -> Table:
    """An input of the delegate."""
    return next(one for one in graph.values.values() if one.fields.get("flags") == 1)


ATTRIBUTES: dict[str, tuple[Callable[[Graph], None], str]] = {
    "an unknown node": (
        lambda g: setattr(of_kind(g, "XNNSoftmax"), "kind", "XNNNewOne"),
        r"node \d+ \(XNNNewOne\) .* no such operator is known",
    ),
    "an unknown flag": (
        lambda g: set_to(of_kind(g, "XNNGlobalAvgPooling2d"), flags=2),
        r"\(XNNGlobalAvgPooling2d\) .* the flags 0x2",
    ),
    "a kernel of another size": (
        lambda g: set_to(of_kind(g, "XNNConv2d"), kernel_height=1),
        r"its weight is \[.*\], its attributes say",
    ),
    "an input that is made later": (
        lambda g: set_to(n := of_kind(g, "XNNGelu"), input_id=n.output_id),
        r"reads \[\d+\] too early",
    ),
    "no such value": (
        lambda g: set_to(of_kind(g, "XNNGelu"), input_id=99999),
        "input_id is 99999, which is no value",
    ),
    "an output twice": (
        lambda g: set_to(n := of_kind(g, "XNNGelu"), output_id=n.input_id),
        r"makes \d+ again",
    ),
    "a weight that is computed": (
        lambda g: set_to(n := of_kind(g, "XNNConv2d"), filter_id=n.input1_id),
        r"its weight \d+ is no constant",
    ),
    "slices of no size": (
        lambda g: set_to(of_kind(g, "XNNStaticSlice"), sizes=[0] * 5),
        r"it slices to \[0, 0",
    ),
    "axes twice": (
        lambda g: set_to(of_kind(g, "XNNStaticTranspose"), perm=[0, 2, 2, 1]),
        r"permutes axes by \[0, 2, 2, 1\]",
    ),
    "too few scales": (
        lambda g: set_to(quantized(g, "PerChannelQuant").quant_params, num_scales=1),
        "1 scales, not",
    ),
    "another axis of scales": (
        lambda g: set_to(quantized(g, "PerChannelQuant").quant_params, channel_dim=7),
        "scales along axis 7",
    ),
    "a type without its scale": (
        lambda g: set_to(quantized(g, "PerTensorQuant").tensor_value, datatype=2),
        "is fp16 with PerTensorQuant",
    ),
    "an argument that is none": (
        lambda g: set_to(argument(g), external_id=77),
        "its arguments are .* of 10",
    ),
    "a value of no kind": (
        lambda g: set_to(g.table.xvalues[5], xvalue_union=None),
        "a value of no kind",
    ),
    "two values of one number": (
        lambda g: set_to(argument(g), id_out=g.table.xvalues[1].xvalue_union.id_out),
        "two values",
    ),
    "a persistent value": (
        lambda g: set_to(g.values[of_kind(g, "XNNGelu").output_id], flags=4),
        "has the flags 4",
    ),
    "an output that is none": (
        lambda g: set_to(g.table, output_ids=[]),
        "names the arguments",
    ),
    "integers moved to another scale": (
        lambda g: set_to(moved(g).quant_params, scale=0.5),
        "moves integers of one scale to those of another",
    ),
}


def moved(graph: Graph) -> Table:
    """An output with a static range of an operator that only moves numbers."""
    return next(
        graph.values[node.output_id]
        for node in graph.nodes
        if node.kind == "XNNStaticTranspose"
        and "quant_params" in graph.values[node.output_id].fields
    )


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_graph_that_xnnpack_would_not_take_is_one_error(
    small: Recorded, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = ATTRIBUTES[name]
    graph = Graph.of(small.pte, VISION)
    change(graph)
    monkeypatch.setattr(xnn, "xnn_table", lambda _: graph.table)
    file = parse(memoryview(small.pte), PROGRAM)
    with pytest.raises(ExportError, match=said) as caught:
        Program(replace(file, methods={VISION: file.methods[VISION]}))
    assert f"{PROGRAM}, method 'vision_encoder', step 0 of 1 (XnnpackBackend)" in str(caught.value)
    assert "fastvlm-export --target executorch" in caught.value.hint


def decoder_with(small: Recorded, change: Callable[[Method], Method]) -> PteFile:
    file = parse(memoryview(small.pte), PROGRAM)
    return replace(file, methods={DECODER: change(file.methods[DECODER])})


def renamed(method: Method, operator: str) -> Method:
    """The first call has another name."""
    number = next(i for i, step in enumerate(method.steps) if isinstance(step, Call))
    steps = list(method.steps)
    steps[number] = replace(method.steps[number], operator=operator)
    return replace(method, steps=tuple(steps))


def with_values(method: Method, change: Callable[[Any], Any]) -> Method:
    return replace(method, values=tuple(map(change, method.values)))


METHODS: dict[str, tuple[Callable[[Method], Method], str]] = {
    "random numbers": (lambda m: renamed(m, "aten::rand.out"), "aten::rand.out.* is known"),
    "a file that is read": (lambda m: renamed(m, "aten::from_file.out"), "from_file.* is known"),
    "another's operator": (lambda m: renamed(m, "llama::sdpa.out"), "llama::sdpa.* is known"),
    "another overload": (lambda m: renamed(m, "aten::add.nothing"), "no such operator is known"),
    "other arguments": (lambda m: renamed(m, "aten::addmm.out"), "arguments, not those of"),
    "a jump": (lambda m: replace(m, control=("JumpFalseCall",)), "instructions JumpFalseCall"),
    "no memory": (lambda m: replace(m, planned_bytes=()), "outside of the memory"),
    "rounded numbers": (
        lambda m: with_values(m, lambda v: replace(v, dtype="float16") if v is m.inputs[0] else v),
        "whose numbers are rounded",
    ),
    "a place between two": (
        lambda m: with_values(m, lambda v: replace(v, place=(0, 1)) if v is m.inputs[0] else v),
        "between two numbers",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_beyond_it_is_one_error(small: Recorded, name: str) -> None:
    change, said = METHODS[name]
    with pytest.raises(ExportError, match=said) as caught:
        Program(decoder_with(small, change))
    assert "method 'text_decoder'" in str(caught.value)


def test_constants_are_never_written(small: Recorded) -> None:
    """They are the file's own bytes."""

    def change(method: Method) -> Method:
        cache = method.buffers[0]
        data = memoryview(bytes(4 * math.prod(cache.sizes)))
        constant = replace(cache, place=None, data=data)
        return with_values(method, lambda v: constant if v is cache else v)

    width = small.arrays["embeds"].shape[-1]
    program = Program(decoder_with(small, change))
    with pytest.raises(ExportError, match="writes the constant"):
        program.run(DECODER, [torch.zeros(1, 1, width), torch.zeros(1, dtype=torch.int64)])


def test_inputs_that_do_not_fit_are_one_error(small: Recorded) -> None:
    program = Program(parse(memoryview(small.pte), PROGRAM))
    with pytest.raises(ExportError, match="takes 2 inputs, not 1"):
        program.run(DECODER, [torch.zeros(1, 1, 64)])
    with pytest.raises(ExportError, match="where the file has float32"):
        program.run(VISION, [torch.zeros(1, 3, 8, 8)])
    with pytest.raises(ExportError, match="no method 'other'"):
        program.run("other", [])
    width = small.arrays["embeds"].shape[-1]
    with pytest.raises(ExportError, match=r"index .* out of bounds"):
        program.run(DECODER, [torch.zeros(1, 1, width), torch.tensor([10**6])])
