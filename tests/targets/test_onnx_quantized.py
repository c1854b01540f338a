"""Quantized layers in ONNX: the very integers in the file, and ONNX Runtime's numbers.

Limits are of the largest value. LIMIT is float32 rounding, of sums of up to 896 terms and of
rescaled ones; an activation on the edge between two integers may round either way, which these
inputs of at most 10 tokens do not hit.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from fastvlm_export.quantize import activations, ops
from fastvlm_export.targets import onnx_files
from fastvlm_export.targets.onnx_lowering import Interface, to_onnx
from fastvlm_export.targets.onnx_pack import pack_bits

LIMIT = 3e-6

assert activations  # importing it registers PT2E's operators


class Layer(nn.Module):
    """A linear layer of random integers: `groups` scales a row."""

    def __init__(
        self, depth: int, rows: int, bits: int, groups: int, *, symmetric: bool, bias: bool
    ) -> None:
        super().__init__()
        half = 2 ** (bits - 1)
        self.bits, self.activation_group = bits, ops.FLOAT_ACTIVATIONS
        self.register_buffer("weight", integers(-half, half, (rows, depth)))
        self.register_buffer("scale", torch.rand(rows, groups) * 0.02 + 0.01)
        zeros = None if symmetric else integers(-half, half, (rows, groups))
        self.register_buffer("zero_point", zeros)
        self.register_buffer("bias", torch.randn(rows) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.fastvlm.quantized_linear(
            x,
            self.weight,
            self.scale,
            self.zero_point,
            self.bias,
            self.bits,
            self.activation_group,
        )
        return out


class Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", integers(-127, 128, (rows, width)))
        self.register_buffer("scale", torch.rand(rows, 1))

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = torch.ops.fastvlm.quantized_embedding(ids, self.weight, self.scale, None, 8)
        return out


class Shared(nn.Module):
    """Two layers that read one x, as the query and key projections do."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            Layer(48, rows, 8, 1, symmetric=True, bias=False) for rows in (24, 16)
        )
        for part in self.parts:
            part.activation_group = ops.PER_TOKEN

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8)


def saved(module: nn.Module, example: Tensor, path: Path) -> onnx.ModelProto:
    """Lower to a file, and read that file."""
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("new", min=1)}
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=(sizes,))
    last = module(example).shape[-1]
    names = Interface(
        inputs={"x": ("batch", "new", *example.shape[2:])}, outputs={"y": ("batch", "new", last)}
    )
    onnx_files.save(to_onnx(program, names), path)
    return onnx.load(path)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def tensor(model: onnx.ModelProto, op_type: str, index: int) -> np.ndarray:
    """The initializer that is input number `index` of the only node of a type."""
    (node,) = (node for node in model.graph.node if node.op_type == op_type)
    (found,) = (t for t in model.graph.initializer if t.name == node.input[index])
    return numpy_helper.to_array(found)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes [N,...] -> signed integers [N,K], written apart from `pack_bits`."""
    flat = packed.reshape(packed.shape[0], -1).astype(np.int16)
    if bits == 8:
        return flat - 128
    return np.stack([flat % 16, flat // 16], axis=-1).reshape(packed.shape[0], -1) - 8


def worst(module: nn.Module, path: Path, x: Tensor) -> float:
    runtime = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = runtime.run(None, {"x": x.numpy()})
    expected = module(x).numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def tokens(count: int, depth: int) -> Tensor:
    """Tokens of very different sizes, one of them all zero."""
    x = torch.randn(1, count, depth) * torch.logspace(-3, 3, count)[None, :, None]
    x[0, count // 2] = 0 if count > 1 else x[0, 0]
    return x


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("depth", [48, 80, 896])
def test_8_bits_per_channel_with_a_scale_per_token(depth: int, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(depth)
    layer = Layer(depth, 40, 8, 1, symmetric=True, bias=bias)
    layer.activation_group = ops.PER_TOKEN
    path = tmp_path / "layer.onnx"
    model = saved(layer, torch.zeros(2, 3, depth), path)
    assert operators(model)["MatMulInteger"] == 1
    assert (layer.weight.numpy() == tensor(model, "MatMulInteger", 1).T).all()
    scales = [numpy_helper.to_array(t) for t in model.graph.initializer if t.dims == [40]]
    assert any((layer.scale[:, 0].numpy() == found).all() for found in scales)
    for count in (1, 10):
        assert worst(layer, path, tokens(count, depth)) < LIMIT


def test_tokens_of_nothing_are_the_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = Layer(48, 40, 8, 1, symmetric=True, bias=True)
    layer.activation_group = ops.PER_TOKEN
    saved(layer, torch.zeros(2, 3, 48), tmp_path / "layer.onnx")
    assert worst(layer, tmp_path / "layer.onnx", torch.zeros(1, 2, 48)) == 0


def test_layers_of_one_input_round_it_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = Shared()
    model = saved(shared, torch.zeros(2, 3, 48), tmp_path / "shared.onnx")
    found = operators(model)
    assert found["MatMulInteger"] == 2
    assert found["QuantizeLinear"] == found["ReduceMax"] == 1
    assert worst(shared, tmp_path / "shared.onnx", tokens(5, 48)) < LIMIT


@pytest.mark.parametrize("rounded", [False, True], ids=["float", "dynamic"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("depth", "group"), [(48, 16), (80, 16), (96, 32), (128, 128), (256, 64), (512, 256)]
)
def test_groups(
    depth: int, group: int, bits: int, symmetric: bool, rounded: bool, tmp_path: Path
) -> None:
    torch.manual_seed(depth)
    layer = Layer(depth, 40, bits, depth // group, symmetric=symmetric, bias=group > 16)
    layer.activation_group = group if rounded else ops.FLOAT_ACTIVATIONS
    path = tmp_path / "layer.onnx"
    model = saved(layer, torch.zeros(2, 3, depth), path)
    assert operators(model) == {"MatMulNBits": 1}
    packed = tensor(model, "MatMulNBits", 1)
    assert packed.shape == (40, depth // group, group * bits // 8)
    assert (unpacked(packed, bits) == layer.weight.numpy()).all()
    assert (tensor(model, "MatMulNBits", 2) == layer.scale.numpy()).all()
    if layer.zero_point is not None:
        zeros = unpacked(tensor(model, "MatMulNBits", 3), bits)
        assert (zeros[:, : depth // group] == layer.zero_point.numpy()).all()
    for count in (1, 10):
        assert worst(layer, path, tokens(count, depth)) < LIMIT


@pytest.mark.parametrize(("depth", "block"), [(48, 32), (80, 32), (192, 64), (896, 128)])
def test_8_bits_per_channel_with_float_activations(depth: int, block: int, tmp_path: Path) -> None:
    """The channel's scale is repeated; the last block of 48 or 80 reaches past the end."""
    torch.manual_seed(depth)
    layer = Layer(depth, 40, 8, 1, symmetric=True, bias=True)
    path = tmp_path / "layer.onnx"
    model = saved(layer, torch.zeros(2, 3, depth), path)
    packed = tensor(model, "MatMulNBits", 1)
    assert packed.shape == (40, -(-depth // block), block)
    assert (unpacked(packed, 8)[:, :depth] == layer.weight.numpy()).all()
    for count in (1, 10):
        assert worst(layer, path, tokens(count, depth)) < LIMIT


def test_an_embedding_table_is_the_programs_and_exact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = Table(300, 48)
    path = tmp_path / "table.onnx"
    model = saved(table, torch.zeros(2, 3, dtype=torch.int64), path)
    tables = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == 3]
    assert len(tables) == 1
    assert (tables[0] == table.weight.numpy()).all()
    assert worst(table, path, torch.tensor([[0, 299, 7, 7], [1, 2, 3, 4]])) == 0


def test_nibbles_lie_low_half_first() -> None:
    assert pack_bits(np.array([[-8, 7, 0, -1]], dtype=np.int8), 4).tolist() == [[0xF0, 0x78]]
    assert pack_bits(np.array([[-128, 127, 0]], dtype=np.int8), 8).tolist() == [[0, 255, 128]]
    with pytest.raises(NotImplementedError, match="3 bits"):
        pack_bits(np.zeros((1, 2), dtype=np.int8), 3)


@pytest.mark.parametrize(
    ("bits", "groups", "activation_group"), [(8, 2, ops.PER_TOKEN), (8, 3, 48), (4, 6, 8)]
)
def test_what_no_kernel_computes_is_refused(
    bits: int, groups: int, activation_group: int, tmp_path: Path
) -> None:
    layer = Layer(48, 16, bits, groups, symmetric=True, bias=False)
    layer.activation_group = activation_group
    with pytest.raises(NotImplementedError, match=f"{bits} bits in {groups} groups"):
        saved(layer, torch.zeros(2, 3, 48), tmp_path / "layer.onnx")


class StaticPair(nn.Module):
    """Two linear layers as PT2E writes them: equal weights, inputs of other ranges."""

    def __init__(self) -> None:
        super().__init__()
        weight = integers(-127, 128, (24, 48))
        for name in ("first", "second"):
            self.register_buffer(f"{name}_weight", weight.clone())
            self.register_buffer(f"{name}_scale", torch.full((24,), 0.01))
            self.register_buffer(f"{name}_zeros", torch.zeros(24, dtype=torch.int64))

    def layer(self, name: str, x: Tensor, scale: float, zero: int) -> Tensor:
        limits = (0, 255, torch.uint8)
        ops = torch.ops.quantized_decomposed
        x = ops.quantize_per_tensor(x, scale, zero, *limits)
        x = ops.dequantize_per_tensor(x, scale, zero, *limits)
        parts = (getattr(self, f"{name}_{part}") for part in ("weight", "scale", "zeros"))
        weight = ops.dequantize_per_channel(*parts, 0, -127, 127, torch.int8)
        return nn.functional.linear(x, weight, torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer("first", x, 0.02, 128)
        return first + self.layer("second", x.cos(), 0.01, 100)


def test_static_linear_layers_multiply_integers_with_scales_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair, path = StaticPair(), tmp_path / "pair.onnx"
    model = saved(pair, torch.zeros(2, 3, 48), path)
    found = operators(model)
    assert found["MatMulInteger"] == 2
    assert not found["DequantizeLinear"]
    assert not found["MatMul"]
    assert worst(pair, path, torch.randn(1, 5, 48)) < LIMIT
