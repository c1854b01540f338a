"""A quantized FastVLM by hand in float64: what a run without rounding has to give.

Only integers, scales and numbers of the programs are read. The operators are those of the float
model, whose weights are put together here; activations that are rounded to integers on a device are
cut at the ends of their range.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.model.fastvlm import FastVLM

QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
PRODUCTS = ("aten.conv2d.default", "aten.linear.default")


@torch.no_grad()
def float64(
    model: FastVLM, programs: Mapping[str, ExportedProgram], context: int
) -> dict[str, nn.Module]:
    """The three graphs' modules, in the types of `graphs.build` but float64."""
    model = copy.deepcopy(model).double()
    state: dict[str, Tensor] = {}
    for program, prefix in (("vision", ""), ("embedding", "decoder."), ("decoder", "")):
        state |= {prefix + name: x for name, x in weights(programs[program]).items()}
    if "decoder.lm_head.weight" in state and not hasattr(model.decoder, "lm_head"):
        rows, width = state["decoder.lm_head.weight"].shape
        model.decoder.lm_head = nn.Linear(width, rows, bias=False, dtype=torch.float64)
    left = model.load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    assert not left.missing_keys
    for name, (entering, leaving) in rounded_ranges(programs["vision"]).items():
        layer = model.get_submodule(name)
        if entering is not None:
            layer.register_forward_pre_hook(lambda _, x, ends=entering: x[0].clamp(*ends))
        if leaving is not None:
            layer.register_forward_hook(lambda _, x, y, ends=leaving: y.clamp(*ends))
    for program in programs.values():
        for name, scale in floats_of_8_bits(program).items():
            most = 448 * scale
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, most=most: x[0].clamp(-most, most)
            )
    built = graphs.build(model, resolution=64, context=context, image_token_id=10**6)
    decoder = built["decoder"].module
    constants = programs["decoder"].constants
    decoder.cos, decoder.sin = constants["cos"].double(), constants["sin"].double()
    return {name: graph.module for name, graph in built.items()}


def weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Every weight and bias in float64, (integer - zero point) * scale where it is stored so."""
    stored = {
        # NumPy has neither of these.
        name: (x.float() if x.dtype in (torch.bfloat16, torch.float8_e4m3fn) else x).numpy()
        for name, x in {**program.constants, **program.state_dict}.items()
    }
    found = {}
    for name, values in stored.items():
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            continue
        # A tower's scales have the weight's name in theirs, a decoder's stand beside the weight.
        names = [f"{name}_scale"] + [f"{layer}.scale"] * (leaf == "weight")
        scale = next((stored[n].astype("float64") for n in names if n in stored), None)
        if scale is None:
            found[name] = torch.from_numpy(values.astype("float64"))
            continue
        zero = stored.get(f"{layer}.zero_point")
        rows = values.astype("float64").reshape(*scale.shape, -1)
        rows = (rows - (0 if zero is None else zero.astype("float64")[..., None])) * scale[
            ..., None
        ]
        found[name] = torch.from_numpy(rows.reshape(values.shape))
    return found


Ends = tuple[float, float] | None


def rounded_ranges(program: ExportedProgram) -> dict[str, tuple[Ends, Ends]]:
    """By layer, the ends of what can enter and leave it, where that is rounded to integers."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {}
    for node in program.graph.nodes:
        if str(node.target) not in PRODUCTS:
            continue
        x, weight = behind_casts(node.args[0]), behind_casts(node.args[1])
        source = weight if weight.op == "placeholder" else weight.args[0]
        readers = [u for user in node.users for u in (user, *user.users)]
        leaving = [
            u for u in readers if str(u.target) == QUANTIZE and behind_casts(u.args[0]) is node
        ]
        found[targets[source.name].removesuffix(".weight")] = (
            ends(x) if str(x.target) == DEQUANTIZE else None,
            ends(leaving[0]) if leaving else None,
        )
    return found


def floats_of_8_bits(program: ExportedProgram) -> dict[str, float]:
    """By layer, the scale of what enters it in fp8."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    return {
        names[behind_casts(node.args[1]).name].removesuffix(".weight"): node.args[4]
        for node in program.graph.nodes
        if str(node.target) == "fastvlm.fp8_linear.default"
    }


def behind_casts(node: Any) -> Any:
    """The node whose value it is, whatever the type."""
    while str(node.target) == "aten._to_copy.default":
        (node,) = node.all_input_nodes
    return node


def ends(node: Any) -> Ends:
    """The values of the least and the greatest integer."""
    _, scale, zero_point, low, high, _ = node.args
    return (low - zero_point) * scale, (high - zero_point) * scale
