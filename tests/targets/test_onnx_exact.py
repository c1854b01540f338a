"""ONNX bundles without any rounding: the same real numbers as the quantized programs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import onnxruntime as ort
import pytest
from onnx import GraphProto, TensorProto, helper, numpy_helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import Array, Session
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.onnx_exact import load_exact
from fastvlm_export.targets.onnx_unrounded import unrounded
from fastvlm_export.validate.limits import EXACT

from .conftest import Small, make_small, normal, worst
from .onnx_faults import (
    Fault,
    add,
    altered,
    constant,
    multiply,
    nth,
    scaled,
    swapped,
    with_attribute,
)
from .test_onnx_recipe_bundles import WEIGHT_ONLY

Stages = dict[str, list[Array]]
"""What a session answers, by stage."""


def answers(session: Session, small: Small) -> Stages:
    """An image, every token, and a conversation: words, the image, one token, several at once."""
    size = small.spec.preprocessing.resolution
    pixels = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    ids = np.arange(small.spec.decoder.vocab_size, dtype=np.int64)[None]
    words, image = normal(1, 30, small.spec.decoder.hidden_size), session.encode_image(pixels)
    session.reset()
    steps = [words[:, :7], words[:, 7:8], words[:, 8:9], words[:, 9:]]
    return {
        "features": [image],
        "embeddings": [session.embed(ids)],
        "logits": [session.decode(np.ascontiguousarray(step)) for step in steps],
    }


_EXPECTED: dict[str, Stages] = {}


def differences(small: Small) -> dict[str, float]:
    """Of the folder's graphs from the programs, nothing rounded on either side: each stage's worst.

    What a recipe's program answers is computed once.
    """
    name, decoder = small.recipe.name, small.spec.decoder
    if name not in _EXPECTED:
        reference = ProgramSession(small.programs, decoder, small.spec.context, exact=True)
        _EXPECTED[name] = answers(reference, small)
    ours = answers(onnx.open(small.bundle, exact=True), small)
    return {
        stage: float(np.max([worst(a, b) for a, b in zip(ours[stage], expected, strict=True)]))
        for stage, expected in _EXPECTED[name].items()
    }


def check(found: dict[str, float]) -> None:
    print(found)
    assert found["features"] < EXACT.features
    assert found["embeddings"] == 0
    assert found["logits"] < EXACT.logits


def test_a_recipe_computes_what_its_program_does(quantized: Small) -> None:
    check(differences(quantized))


def test_so_do_zero_points_of_weights_and_mixed_layers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    check(differences(make_small(tmp_path_factory, WEIGHT_ONLY.name, WEIGHT_ONLY, tied=True)))


def test_so_do_floats(small: Small) -> None:
    check(differences(small))


@pytest.mark.parametrize("graph", ["vision", "embedding", "decoder"])
def test_no_kernel_that_rounds_is_left_or_comes_back(
    quantized: Small, graph: str, tmp_path: Path
) -> None:
    """Of the graph that ONNX Runtime makes of it: all floats are 32 bits wide."""
    path = quantized.paths[graph]
    model = unrounded(onnx_package.load(path))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = onnx_package.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    operators = {node.op_type for node in made.node}
    assert not {name for name in operators if "Integer" in name or "QLinear" in name}
    assert "QuantizeLinear" not in operators
    levels = [
        attribute.i
        for node in made.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    assert set(levels) <= {1}
    assert bool(levels) == (quantized.recipe.name == "int4" and graph == "decoder")
    assert TensorProto.FLOAT16 not in {
        value.type.tensor_type.elem_type for value in made.value_info
    }


def queries_for_keys(graph: GraphProto) -> None:
    """Of the tower's first attention, whose three parts are slices of one product."""
    first, second = (nth(graph, "Squeeze", index) for index in (0, 1))
    first.input[0], second.input[0] = second.input[0], first.input[0]


def position_before(graph: GraphProto) -> None:
    """The newest token's place is taken for one less than it is."""
    sub = nth(graph, "Sub")
    graph.initializer.append(numpy_helper.from_array(np.array(2, np.int64), "two"))
    sub.input[1] = "two"


FAULTS: dict[str, tuple[str, Fault, str]] = {
    "a convolution's output": ("vision", scaled("Conv", 3), "features"),
    "the tower's last convolution": ("vision", scaled("Conv", -3), "features"),
    "GELU by tanh": ("vision", with_attribute("Gelu", "approximate", "tanh", 2), "features"),
    "queries for keys": ("vision", queries_for_keys, "features"),
    "the projector's output": ("vision", scaled("Gelu", -1), "features"),
    "a norm's epsilon": ("decoder", with_attribute("RMSNormalization", "epsilon", 0.1), "logits"),
    "keys for values": ("decoder", swapped("GroupQueryAttention", 0, 1, 2), "logits"),
    "cosines for sines": ("decoder", swapped("GroupQueryAttention", 1, 7, 8), "logits"),
    "one angle": ("decoder", constant("GroupQueryAttention", 7, add(-0.01, at=31)), "logits"),
    "a position": ("decoder", position_before, "logits"),
    "attention's output": ("decoder", scaled("GroupQueryAttention", 1), "logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_rounding_would_hide_is_found(
    quantized: Small, fault: str, tmp_path: Path
) -> None:
    graph, change, stage = FAULTS[fault]
    found = differences(altered(quantized, graph, change, tmp_path / "altered"))
    print(f"{fault}, {quantized.recipe.name}: {found[stage]:.1e}")
    assert not found[stage] <= getattr(EXACT, stage)  # a wrong position may also make NaN


OF_INTEGERS: dict[str, tuple[str, Fault, str]] = {
    "a weight's scale": ("vision", constant("DequantizeLinear", 1, multiply(1.001)), "features"),
    "a weight": ("vision", constant("DequantizeLinear", 0, add(1)), "features"),
    "a quantizer's scale": ("vision", constant("QuantizeLinear", 1, multiply(1.001)), "features"),
    "a zero point": ("vision", constant("QuantizeLinear", 2, add(1)), "features"),
    "a product's zero point": ("vision", constant("MatMulInteger", 2, add(1), 4), "features"),
    "a product": ("vision", scaled("MatMulInteger", 4), "features"),
    "a row of the table": ("embedding", constant("Gather", 0, add(1, at=900)), "embeddings"),
    "its scale": ("embedding", constant("Gather", 0, multiply(1.001, at=9), -1), "embeddings"),
}


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
@pytest.mark.parametrize("fault", OF_INTEGERS)
def test_a_fault_of_integers_is_found(quantized: Small, fault: str, tmp_path: Path) -> None:
    graph, change, stage = OF_INTEGERS[fault]
    found = differences(altered(quantized, graph, change, tmp_path / "altered"))
    print(f"{fault}: {found[stage]:.1e}")
    assert found[stage] > getattr(EXACT, stage)


OF_4_BITS: dict[str, Fault] = {
    "a weight's byte": constant("MatMulNBits", 1, add(16, at=5), 2),
    "a block's scale": constant("MatMulNBits", 2, multiply(1.001), 2),
    "a bias": constant("MatMulNBits", 5, multiply(1.01), 1),
}


@pytest.mark.parametrize("quantized", ["int4"], indirect=True)
@pytest.mark.parametrize("fault", OF_4_BITS)
def test_a_fault_of_packed_weights_is_found(quantized: Small, fault: str, tmp_path: Path) -> None:
    changed = altered(quantized, "decoder", OF_4_BITS[fault], tmp_path / "altered")
    found = differences(changed)["logits"]
    print(f"{fault}: {found:.1e}")
    assert found > EXACT.logits


def without_zero_point(graph: GraphProto) -> None:
    del nth(graph, "QuantizeLinear").input[2]


def of_16_bits(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int16), "wide"))
    nth(graph, "QuantizeLinear").input[2] = "wide"


def signed(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "signed"))
    nth(graph, "QuantizeLinear").input[2] = "signed"


def per_channel(graph: GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones(16, np.float32), "scales"))
    nth(graph, "QuantizeLinear").input[1] = "scales"


def instead(operator: str, domain: str = "", **attributes: Any) -> Fault:
    """An operator between the first Gelu and what it read."""

    def fault(graph: GraphProto) -> None:
        gelu = nth(graph, "Gelu")
        added = helper.make_node(operator, [gelu.input[0]], ["between"], domain=domain)
        added.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        gelu.input[0] = "between"
        nodes = list(graph.node)
        nodes.insert(nodes.index(gelu), added)
        del graph.node[:]
        graph.node.extend(nodes)

    return fault


def reads_integers(graph: GraphProto) -> None:
    nth(graph, "Gelu", -1).input[0] = nth(graph, "QuantizeLinear").output[0]


REFUSED: dict[str, tuple[Fault, str]] = {
    "no zero point": (without_zero_point, "QuantizeLinear .* does not have the inputs"),
    "16 bits": (of_16_bits, "QuantizeLinear .* rounds to INT16"),
    "two types": (signed, "DequantizeLinear .* zero point of another type"),
    "scales per channel": (per_channel, "QuantizeLinear .*: scales has 16 numbers, not one"),
    "Round": (instead("Round"), "Round 'between' rounds"),
    "integers": (instead("Cast", to=TensorProto.INT32), "Cast 'between' computes in type INT32"),
    "float8": (
        instead("Cast", to=TensorProto.FLOAT8E4M3FN),
        "Cast 'between' computes in type FLOAT8E4M3FN",
    ),
    "dynamic": (instead("DynamicQuantizeLinear"), "DynamicQuantizeLinear 'between' rounds"),
    "others'": (
        instead("FastGelu", "com.microsoft"),
        "FastGelu 'between' is not known to compute in float32",
    ),
    "a domain": (instead("Gelu", "org.example"), "Gelu 'between' is of domain org.example"),
    "quantized floats": (reads_integers, "Gelu .* reads integers that were rounded"),
}


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_is_one_error(quantized: Small, name: str, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    changed = altered(quantized, "vision", change, tmp_path / "changed")
    with pytest.raises(
        ExportError, match=rf"{changed.paths['vision'].name} is no graph of target 'onnx': {said}"
    ) as caught:
        onnx.open(changed.bundle, exact=True)
    assert "fastvlm-export --target onnx" in caught.value.hint


def test_damaged_files_are_one_error(small: Small, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(small.paths["decoder"].read_bytes()[:1000])
    for path in (damaged, tmp_path / "missing.onnx"):
        with pytest.raises(ExportError, match=path.name) as caught:
            load_exact(path, target="onnx")
        assert "fastvlm-export --target onnx" in caught.value.hint
