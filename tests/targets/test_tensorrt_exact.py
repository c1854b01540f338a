"""The graphs of engines without any rounding: the same real numbers as the quantized programs."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.tensorrt_onnx_session import TensorRTOnnxSession
from fastvlm_export.validate.limits import EXACT

from .tensorrt_toys import Lowered, shared, worst_of_all


@pytest.fixture(scope="module", params=["fp16", "bf16", "int8", "int4", "fp8"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    recipe: str = request.param
    # Numbers in a head, and data files, as other tests have them that share it.
    head_dim = {"bf16": 24, "int8": 20}.get(recipe, 16)
    return shared(tmp_path_factory, recipe, head_dim, data_files=recipe == "int4")


def differences(lowered: Lowered, *, exact: bool) -> dict[str, float]:
    """Of a session on the folder, from the programs, both with or both without rounding."""
    context = lowered.spec.context
    bundle: Any = SimpleNamespace(path=lowered.folder, manifest=SimpleNamespace(context=context))
    ours = TensorRTOnnxSession(bundle, exact=exact)
    reference = ProgramSession(lowered.programs, lowered.spec.decoder, context, exact=exact)
    return worst_of_all(ours, reference, lowered.spec)


def first(graph: onnx.GraphProto, operator: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == operator)


def altered(
    lowered: Lowered, graph: str, change: Callable[[onnx.GraphProto], None], folder: Path
) -> Lowered:
    """A copy with one of its graphs changed."""
    copied = replace(lowered, folder=Path(shutil.copytree(lowered.folder, folder)))
    path = copied.folder / copied.graphs[graph].file
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return copied


def test_without_rounding_every_recipe_computes_what_its_program_does(lowered: Lowered) -> None:
    exact, typed = (differences(lowered, exact=e) for e in (True, False))
    print(f"exact {exact}, typed {typed}")
    assert exact["features"] < EXACT.features
    assert exact["embeddings"] < 1e-6
    assert exact["logits"] < EXACT.logits
    assert typed["logits"] > EXACT.logits


@pytest.mark.parametrize("lowered", ["fp16", "int8"], indirect=True)
@pytest.mark.parametrize(
    ("graph", "operator", "attribute", "value", "stage"),
    [
        ("vision", "Gelu", "approximate", "tanh", "features"),
        ("decoder", "RMSNormalization", "epsilon", 0.1, "logits"),
    ],
)
def test_an_operator_that_rounding_would_hide_shows(
    lowered: Lowered,
    tmp_path: Path,
    graph: str,
    operator: str,
    attribute: str,
    value: str | float,
    stage: str,
) -> None:
    """In one node of many."""

    def change(graph: onnx.GraphProto) -> None:
        node = first(graph, operator)
        kept = [one for one in node.attribute if one.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])

    changed = altered(lowered, graph, change, tmp_path / "changed")
    before, after = (differences(one, exact=True)[stage] for one in (lowered, changed))
    typed = differences(changed, exact=False)[stage]
    print(f"exact {before:.1e} -> {after:.1e}, typed {typed:.1e}")
    assert before < getattr(EXACT, stage) < after


def without_zero_point(graph: onnx.GraphProto) -> None:
    del first(graph, "QuantizeLinear").input[2]


def of_16_bits(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int16), "wide"))
    first(graph, "QuantizeLinear").input[2] = "wide"


def without_inputs(graph: onnx.GraphProto) -> None:
    del first(graph, "DequantizeLinear").input[:]


@pytest.mark.parametrize("lowered", ["int8"], indirect=True)
@pytest.mark.parametrize("change", [without_zero_point, of_16_bits, without_inputs])
def test_a_graph_of_others_is_one_error(
    lowered: Lowered, tmp_path: Path, change: Callable[[onnx.GraphProto], None]
) -> None:
    changed = altered(lowered, "vision", change, tmp_path / "changed")
    with pytest.raises(
        ExportError, match=r"vision\.onnx is no graph of target 'tensorrt'"
    ) as caught:
        differences(changed, exact=True)
    assert "fastvlm-export" in caught.value.hint
