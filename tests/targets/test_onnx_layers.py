"""The integer vision graph in ONNX Runtime against the program it was lowered from, layer by layer.

End to end, two float32 implementations of a quantized tower differ by far more than rounding: a
value within 1e-6 of the edge between two integers falls to either side, and moves others across
theirs. So the program is run node by node, and behind each quantizer goes on with the integers that
the artifact has there. What is left is what one layer makes of equal inputs.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, fx
from torch.export import ExportedProgram

from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.samples import samples
from fastvlm_export.quantize.activations import CONV, DEQUANTIZE, LINEAR
from fastvlm_export.targets.base import Array
from fastvlm_export.targets.onnx_session import load_graph

from .conftest import Small

ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default

BEYOND = 1e-3
"""Steps past the edge between two integers. One float32 rounding of 255 steps is 1.5e-5; measured
are 3e-5, and 1e-1 for the faintest fault below, which flips only 1.2e-4 of a layer's values.
"""
SHARE = 1e-3
"""Of values that flip: at most 1e-4 measured, and one of a layer's 1280 in all images is 8e-4."""
FEATURES = 1e-5
"""Error of the features, of their peak: float32 rounding behind the last quantizer, 4e-7 here."""

Key = tuple[float, int]
"""Scale and zero point."""
Integers = dict[Key, deque[tuple[str, Tensor]]]
"""What the quantizers of one scale and zero point are called and return, in the graph's order."""
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One quantizer: how far each of its values lies from the artifact's integer, in steps.

    `beyond`: how far the program's unrounded value lies outside of what rounds to that integer.
    """

    quantizer: str
    source: str
    steps: Tensor
    beyond: Tensor

    @property
    def share(self) -> float:
        return float(self.steps.bool().double().mean())

    @property
    def farthest(self) -> float:
        return float(self.beyond.max())

    @property
    def is_sound(self) -> bool:
        return int(self.steps.max()) <= 1 and self.share <= SHARE and self.farthest <= BEYOND

    def __str__(self) -> str:
        return (
            f"{self.quantizer} of {self.source}: {self.share:.1e} of {self.steps.numel()} differ, "
            f"by at most {int(self.steps.max())} steps, {self.farthest:.1e} past the edge"
        )


class Artifact:
    """A vision graph in ONNX Runtime, every optimization on, that also returns its integers."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.quantizers: list[tuple[str, Key]] = []
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = (constants[name].item() for name in node.input[1:])
                self.quantizers.append((node.output[0], (scale, zero)))
        shown = ModelProto()
        shown.CopyFrom(model)
        shown.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.UINT8, None)
            for name, _ in self.quantizers
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        self.session = ort.InferenceSession(
            shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        optimized = onnx.load(folder / "optimized.onnx")
        self.operators = Counter(node.op_type for node in optimized.graph.node)

    def run(self, pixels: Array) -> tuple[Array, Integers]:
        features, *arrays = self.session.run(None, {"pixel_values": pixels})
        found: Integers = {}
        for (name, key), array in zip(self.quantizers, arrays, strict=True):
            found.setdefault(key, deque()).append((name, torch.from_numpy(array)))
        return features, found


class Resynchronized(fx.Interpreter):
    """The program, going on with the artifact's integers behind each quantizer."""

    def __init__(self, module: fx.GraphModule, integers: Integers) -> None:
        super().__init__(module)
        self.integers = integers
        self.compared: list[Compared] = []

    def run_node(self, n: fx.Node) -> Any:
        ours = super().run_node(n)
        if n.target is not ROUND:
            return ours
        (x, scale, zero, low, high, _), _ = self.fetch_args_kwargs_from_env(n)
        source = source_of(n)
        waiting = self.integers.get((scale, zero))
        assert waiting, f"{source} is rounded to {scale} and {zero}, in the artifact nothing is"
        name, theirs = waiting.popleft()
        assert theirs.shape == ours.shape
        assert theirs.dtype == ours.dtype == torch.uint8
        steps = (theirs.int() - ours.int()).abs().flatten()
        exact = (x.double() / scale + zero).clamp(low, high)
        beyond = ((exact - theirs).abs() - 0.5).clamp(min=0).flatten()
        self.compared.append(Compared(quantizer=name, source=source, steps=steps, beyond=beyond))
        return theirs


def source_of(quantizer: fx.Node) -> str:
    """What it rounds: a convolution by its layer's name, anything else by the node's."""
    source: Any = quantizer.args[0]
    if source.target is not CONV:
        return str(source.name)
    weight = source.args[1]
    constant = weight.args[0] if weight.target is DEQUANTIZE else weight
    return str(constant.target).removesuffix(".weight")


def broken(program: ExportedProgram, artifact: Artifact, images: Sequence[Array]) -> list[str]:
    """The quantizers, and the features, that more than rounding separates, the first one first."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    runs, errors = [], []
    for pixels in images:
        features, integers = artifact.run(pixels)
        reference = Resynchronized(module, integers)
        with torch.inference_mode():
            expected = reference.run(torch.from_numpy(pixels)).numpy()
        unmatched = [name for rest in integers.values() for name, _ in rest]
        assert not unmatched, f"the program has no {unmatched}"
        assert features.shape == expected.shape
        errors.append(np.abs(features - expected).max() / np.abs(expected).max())
        runs.append(reference.compared)
    compared = [joined(found) for found in zip(*runs, strict=True)]
    error = np.max(errors)
    print(f"{len(compared)} quantizers, features {error:.1e} of their peak")
    print("most flips:", max(compared, key=lambda one: one.share))
    print("farthest:", max(compared, key=lambda one: one.farthest))
    wrong = [one.quantizer for one in compared if not one.is_sound]
    return wrong if error <= FEATURES else [*wrong, "image_features"]


def joined(found: Sequence[Compared]) -> Compared:
    """One quantizer, on several images."""
    (name,) = {one.quantizer for one in found}
    steps, beyond = (torch.cat([getattr(one, k) for one in found]) for k in ("steps", "beyond"))
    return Compared(quantizer=name, source=found[0].source, steps=steps, beyond=beyond)


def images_for(tower: Small) -> list[Array]:
    return [preprocess(sample.image, tower.spec.preprocessing) for sample in samples(())]


def check(tower: Small, folder: Path) -> None:
    program, path = tower.programs["vision"], tower.paths["vision"]
    artifact = Artifact(onnx.load(path), folder)
    layers = [node for node in program.graph.nodes if node.target in (CONV, LINEAR)]
    integer = Counter(n.target for n in layers if n.args[1].target is DEQUANTIZE)
    assert artifact.operators["QLinearConv"] == integer[CONV] > 10
    assert artifact.operators["MatMulInteger"] == integer[LINEAR] > 5
    images = images_for(tower)
    # To show the integers changes nothing in how the others are computed.
    (shipped,) = load_graph(path, intra_op_threads=1).run(None, {"pixel_values": images[-1]})
    assert (shipped == artifact.run(images[-1])[0]).all()
    assert broken(program, artifact, images) == []


@pytest.mark.parametrize("quantized", ["int8"], indirect=True)
def test_layers_of_a_random_model_differ_by_rounding(quantized: Small, tmp_path: Path) -> None:
    check(quantized, tmp_path)


BUNDLED_INT8 = pytest.mark.parametrize(
    "bundled_quantized", [pytest.param("int8", marks=pytest.mark.e2e)], indirect=True
)


@BUNDLED_INT8
def test_layers_of_the_trained_model_differ_by_rounding(
    bundled_quantized: Small, tmp_path: Path
) -> None:
    check(bundled_quantized, tmp_path)


def edit(model: ModelProto, name: str, change: Change) -> None:
    """Put a changed constant in the place of one."""
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    before = numpy_helper.to_array(tensor)
    after = change(before.copy()).astype(before.dtype)
    assert (after != before).any()
    tensor.CopyFrom(numpy_helper.from_array(after, name))


def quantizer_after(model: ModelProto, node: NodeProto) -> str:
    """The next one in the file, the features where there is none."""
    nodes = [*model.graph.node]
    rest = nodes[nodes.index(node) :]
    return next((n.output[0] for n in rest if n.op_type == "QuantizeLinear"), "image_features")


def in_convolution(model: ModelProto, operand: int, part: int, change: Change) -> str:
    """Integers (part 0) or scales (1) of weight (operand 1) or bias (2), in the tower's middle."""
    made = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    found = [n for n in model.graph.node if n.op_type == "Conv" and n.input[1] in made]
    conv = found[len(found) // 2]
    edit(model, made[conv.input[operand]].input[part], change)
    return quantizer_after(model, conv)


def in_linear(model: ModelProto, which: int) -> str:
    """The scales behind a linear layer's integer product, 1 % too large."""
    casts = [node.output[0] for node in model.graph.node if node.op_type == "Cast"]
    (scaled,) = (node for node in model.graph.node if casts[which] in node.input)
    (scale,) = {tensor.name for tensor in model.graph.initializer}.intersection(scaled.input)
    edit(model, scale, lambda a: a * 1.01)
    return quantizer_after(model, scaled)


def before_quantizer(model: ModelProto) -> str:
    """A GELU 0.1 % too large, where it is rounded."""
    gelus = {node.output[0] for node in model.graph.node if node.op_type == "Gelu"}
    found = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in gelus]
    reader = found[len(found) // 2]
    place = [*model.graph.node].index(reader)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1.001, "f4"), "factor"))
    model.graph.node.insert(place, helper.make_node("Mul", [reader.input[0], "factor"], ["off"]))
    model.graph.node[place + 1].input[0] = "off"
    return quantizer_after(model, model.graph.node[place])


def plus_one(weight: np.ndarray) -> np.ndarray:
    """One of many thousand, in the middle."""
    row = weight[len(weight) // 2]
    row[np.flatnonzero(row < 127)[0]] += 1
    return weight


FAULTS: dict[str, Callable[[ModelProto], str]] = {
    "one weight + 1": lambda model: in_convolution(model, 1, 0, plus_one),
    "one channel's scale x 1.01": lambda model: in_convolution(
        model, 1, 1, lambda scale: scale * np.where(np.arange(len(scale)) == 48, 1.01, 1)
    ),
    "two channels' biases swapped": lambda model: in_convolution(
        model, 2, 0, lambda bias: np.concatenate([bias[1::-1], bias[2:]])
    ),
    "a GELU x 1.001": before_quantizer,
    "a linear layer x 1.01": lambda model: in_linear(model, 2),
    "the last layer x 1.01": lambda model: in_linear(model, -1),
}
"""Name -> plants it in a graph and returns what it should break first, and alone."""


@pytest.mark.parametrize("fault", FAULTS)
@BUNDLED_INT8
def test_a_fault_is_named_by_its_quantizer(
    bundled_quantized: Small, fault: str, tmp_path: Path
) -> None:
    model = onnx.load(bundled_quantized.paths["vision"])
    expected = FAULTS[fault](model)
    program, images = bundled_quantized.programs["vision"], images_for(bundled_quantized)
    assert broken(program, Artifact(model, tmp_path), images[-2:]) == [expected]


@BUNDLED_INT8
def test_a_quantizer_of_another_scale_is_refused(bundled_quantized: Small, tmp_path: Path) -> None:
    model = onnx.load(bundled_quantized.paths["vision"])
    rounding = [node for node in model.graph.node if node.op_type == "QuantizeLinear"][3]
    edit(model, rounding.input[1], lambda a: a * 1.01)
    program, images = bundled_quantized.programs["vision"], images_for(bundled_quantized)
    with pytest.raises(AssertionError, match=r"convffn\.fc1 is rounded to .* nothing is"):
        broken(program, Artifact(model, tmp_path), images[:1])
