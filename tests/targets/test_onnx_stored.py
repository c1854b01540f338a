"""ONNX bundles of small models, one number changed at a time, against the programs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx as onnx_package
import pytest
import torch
from onnx import GraphProto, helper, numpy_helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import onnx_stored
from fastvlm_export.targets.onnx_contents import Contents
from fastvlm_export.validate.parity import Stage
from fastvlm_export.validate.stored import StoredWeights, compare_stored, has_stored

from .conftest import Small, byte_tokenizer, export, lively_model, make_small, make_spec
from .onnx_faults import Fault, add, altered, constant, multiply, nth, scaled, with_attribute
from .test_onnx_recipe_bundles import WEIGHT_ONLY

STAGES = {
    "vision": Stage.IMAGE_FEATURES,
    "embedding": Stage.EMBEDDINGS,
    "decoder": Stage.FIRST_TOKEN,
}


def compare(small: Small) -> StoredWeights:
    manifest = SimpleNamespace(target="onnx", files=small.bundle.manifest.files)
    bundle: Any = SimpleNamespace(path=small.folder, manifest=manifest)
    assert has_stored(bundle)
    return compare_stored(bundle, small.programs)


def check_all_are_found(small: Small) -> None:
    found = compare(small)
    print(found.verdict, [one.numbers for one in found.functions])
    assert found.passed, found.verdict
    assert [one.stage for one in found.functions] == list(STAGES.values())
    decoder = small.spec.decoder
    assert found.functions[1].numbers >= decoder.vocab_size * decoder.hidden_size
    assert "number by number" in found.verdict


def test_a_bundle_holds_what_its_programs_read_and_nothing_else(quantized: Small) -> None:
    check_all_are_found(quantized)


def test_so_do_floats_zero_points_and_mixed_layers(
    small: Small, tied: Small, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for one in (
        small,
        tied,
        make_small(tmp_path_factory, WEIGHT_ONLY.name, WEIGHT_ONLY, tied=True),
    ):
        check_all_are_found(one)


def test_what_changes_nothing_need_not_be_there(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A convolution's biases of 0 are left out, as weights that nobody trained have them."""
    model = lively_model(byte_tokenizer().vocab_size, tied=True, depths=(1, 1, 1, 1, 1), layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.zero_()
    made = export(tmp_path_factory, "neutral", model, make_spec(model), RECIPES["fp32"])
    check_all_are_found(made)
    bias = "vision_tower.network.0.0.convffn.fc1.bias"
    assert bias not in {
        tensor.name for tensor in onnx_package.load(made.paths["vision"]).graph.initializer
    }
    reads = {
        one.name: (one.reads, one.most) for one in onnx_stored.expected(made.programs["vision"])
    }
    assert reads[bias] == (0, 1)


def one_bit_of_each(graph: GraphProto) -> None:
    """Change every tensor that the nodes read, at a random byte."""
    read = {name for node in graph.node for name in node.input}
    generator = np.random.default_rng(7)
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.name in read and array.dtype != np.int64:
            data = bytearray(array.tobytes())
            data[int(generator.integers(len(data)))] ^= 1
            tensor.raw_data = bytes(data)


@pytest.mark.parametrize("graph", STAGES)
def test_one_changed_bit_of_any_tensor_is_found(
    quantized: Small, graph: str, tmp_path: Path
) -> None:
    found = compare(altered(quantized, graph, one_bit_of_each, tmp_path / "altered"))
    [broken] = [one for one in found.functions if not one.passed]
    tensors = [one for one in onnx_stored.expected(quantized.programs[graph]) if one.reads]
    wanted = {one.name for one in tensors if one.size > 1}
    assert wanted
    assert wanted <= set(broken.missing)


def again(graph: GraphProto) -> None:
    """Activations rounded once more by a quantizer that the graph has."""
    quantize = nth(graph, "QuantizeLinear", 3)
    gelu = nth(graph, "Gelu", 5)
    twice = helper.make_node("QuantizeLinear", [gelu.input[0], *quantize.input[1:]], ["twice"])
    back = helper.make_node("DequantizeLinear", ["twice", *quantize.input[1:]], ["back"])
    gelu.input[0] = "back"
    nodes = list(graph.node)
    place = nodes.index(gelu)
    nodes[place:place] = [twice, back]
    del graph.node[:]
    graph.node.extend(nodes)


def by_a_node(graph: GraphProto) -> None:
    """A factor that is no initializer."""
    scaled("Gelu", 1)(graph)
    factor = next(tensor for tensor in graph.initializer if tensor.name.endswith(".factor"))
    graph.node.insert(0, helper.make_node("Constant", [], [factor.name], "node", value=factor))
    graph.initializer.remove(factor)


def without_epsilon(graph: GraphProto) -> None:
    norm = nth(graph, "RMSNormalization")
    kept = [one for one in norm.attribute if one.name != "epsilon"]
    del norm.attribute[:]
    norm.attribute.extend(kept)


def anothers_norm(graph: GraphProto) -> None:
    """Two layers read the weight of one."""
    first, second = (nth(graph, "SkipSimplifiedLayerNormalization", index) for index in (0, 1))
    second.input[2] = first.input[2]


EPSILON = "decoder.norm"
ON_ALL: dict[str, tuple[str, Fault, str]] = {
    "a factor": ("vision", scaled("Conv", 3), ".factor"),
    "a factor that is a node": ("vision", by_a_node, "node's value"),
    "a weight": ("vision", constant("Conv", 1, multiply(1.01, at=0)), "weight"),
    "a norm's epsilon": ("decoder", with_attribute("RMSNormalization", "epsilon", 1e-5), EPSILON),
    "no epsilon": ("decoder", without_epsilon, EPSILON),
    "GELU by tanh": ("vision", with_attribute("Gelu", "approximate", "tanh", -1), "gelu"),
    "attention's scale": ("decoder", with_attribute("GroupQueryAttention", "scale", 0.3), "scale"),
    "an angle": ("decoder", constant("GroupQueryAttention", 7, add(0.01, at=31), 1), "cos"),
}
STATIC: dict[str, tuple[str, Fault, str]] = {
    "a weight's scale": ("vision", constant("DequantizeLinear", 1, multiply(1.001, at=3)), "scale"),
    "a weight": ("vision", constant("DequantizeLinear", 0, add(1)), "weight"),
    "a weight's zero point": ("vision", constant("DequantizeLinear", 2, add(1)), "zero_point"),
    "a quantizer's scale": ("vision", constant("QuantizeLinear", 1, multiply(1.001)), "'s scale"),
    "a zero point": ("vision", constant("QuantizeLinear", 2, add(1), 5), "'s zero point"),
    "a product's zero point": ("vision", constant("MatMulInteger", 2, add(1)), "'s zero point"),
    "a quantizer too many": ("vision", again, "val_"),
    "a row of the table": ("embedding", constant("Gather", 0, add(1, at=900)), "weight"),
    "its scale": ("embedding", constant("Gather", 0, multiply(1.001, at=9), -1), "scale"),
    "another's norm": ("decoder", anothers_norm, "layernorm.weight"),
    "a token's zero point": ("decoder", constant("QuantizeLinear", 2, add(1)), "'s zero point"),
    "a product's own": ("decoder", constant("MatMulInteger", 2, add(1)), "'s zero point"),
    "a token's range": ("decoder", constant("Div", 1, add(1)), "127.0 of"),
}
PACKED: dict[str, tuple[str, Fault, str]] = {
    "a weight in four bits": ("decoder", constant("MatMulNBits", 1, add(16, at=5), 2), "weight"),
    "a block's scale": ("decoder", constant("MatMulNBits", 2, multiply(1.001, at=1), 2), "scale"),
    "a bias": ("decoder", constant("MatMulNBits", 5, multiply(1.01, at=0), 1), "bias"),
    "a level": ("decoder", with_attribute("MatMulNBits", "accuracy_level", 1), "accuracy level"),
}


def check_is_named(small: Small, fault: tuple[str, Fault, str], folder: Path) -> None:
    graph, change, named = fault
    found = compare(altered(small, graph, change, folder))
    assert not found.passed
    assert found.first_broken is STAGES[graph]
    [broken] = [one for one in found.functions if not one.passed]
    assert broken.foreign or broken.missing
    print(broken.missing[:2], broken.foreign[:2])
    assert any(named in name for name in (*broken.missing, *broken.foreign))
    assert broken.package == small.paths[graph].name
    assert broken.package in found.verdict


@pytest.mark.parametrize("fault", ON_ALL)
def test_a_changed_number_is_named(quantized: Small, fault: str, tmp_path: Path) -> None:
    check_is_named(quantized, ON_ALL[fault], tmp_path / "altered")


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
@pytest.mark.parametrize("fault", STATIC)
def test_so_is_one_of_8_bits(quantized: Small, fault: str, tmp_path: Path) -> None:
    check_is_named(quantized, STATIC[fault], tmp_path / "altered")


@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
@pytest.mark.parametrize("fault", PACKED)
def test_so_is_one_of_4_bits(quantized: Small, fault: str, tmp_path: Path) -> None:
    check_is_named(quantized, PACKED[fault], tmp_path / "altered")


def test_a_changed_zero_point_of_a_block_is_named(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    made = make_small(tmp_path_factory, WEIGHT_ONLY.name, WEIGHT_ONLY, tied=True)
    fault = "decoder", constant("MatMulNBits", 3, add(1)), "zero_point"
    check_is_named(made, fault, tmp_path / "altered")
    blocks = "vision", constant("MatMulNBits", 2, multiply(1.001, at=1)), "scale"
    check_is_named(made, blocks, tmp_path / "blocks")


def with_a_graph_inside(graph: GraphProto) -> None:
    inner = helper.make_graph([], "inner", [], [])
    nth(graph, "Gelu").attribute.append(helper.make_attribute("body", inner))


@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
@pytest.mark.parametrize(
    ("graph", "change"),
    [
        ("vision", with_a_graph_inside),
        ("decoder", with_attribute("MatMulNBits", "bits", 3)),
        ("decoder", with_attribute("MatMulNBits", "N", 5)),
    ],
)
def test_what_cannot_be_read_is_one_error(
    quantized: Small, graph: str, change: Fault, tmp_path: Path
) -> None:
    changed = altered(quantized, graph, change, tmp_path / "altered")
    with pytest.raises(ExportError, match=changed.paths[graph].name) as caught:
        compare(changed)
    assert "fastvlm-export --target onnx" in caught.value.hint


def test_a_missing_file_is_one_error(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gone\.onnx"):
        Contents(tmp_path / "gone.onnx")


def test_a_constant_that_nobody_accounts_for_is_refused(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_stored._Collector, "_add_attention", lambda self, node: None)
    with pytest.raises(RuntimeError, match="cos, sin: read"):
        onnx_stored.expected(small.programs["decoder"])
