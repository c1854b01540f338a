"""Each rewrite: the structure that it leaves, and that it changes no number."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from fastvlm_export.exporter.model.decoder import RMSNorm
from fastvlm_export.exporter.model.fastvithd import LayerNormChannel
from fastvlm_export.targets import onnx_files
from fastvlm_export.targets.onnx_lowering import Interface, to_onnx


class TwoNorms(nn.Module):
    """A residual stream as in the decoder: norm, then sum and norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = RMSNorm(48, 1e-6), RMSNorm(48, 1e-6)
        nn.init.normal_(self.first.weight)
        nn.init.normal_(self.second.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + self.first(x).sin()
        return self.second(total), total


class TwoEqualNorms(nn.Module):
    """Two norms whose weights are equal, and so share their initializers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LayerNormChannel(8), LayerNormChannel(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(2).transpose(1, 2)
        return tokens + self.second(x.cos()).flatten(2).transpose(1, 2)


class TokensOfNorm(nn.Module):
    """A norm over channels and the tokens that attention makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = LayerNormChannel(32), nn.Linear(32, 1500, bias=False)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.qkv(self.norm(x).flatten(2).transpose(1, 2))
        return out


def lowered(module: nn.Module, x: Tensor, outputs: int) -> tuple[Counter[str], float]:
    """Operators of the lowered module, and the worst difference relative to the largest value."""
    names = Interface(
        inputs={"x": ("batch_size", *x.shape[1:])},
        outputs={f"y{i}": ("batch_size",) for i in range(outputs)},
    )
    program = torch.export.export(
        module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch_size", min=1)},)
    )
    model = to_onnx(program, names)
    for value in model.graph.outputs:
        value.shape = None
    expected = module(x)
    expected = [expected] if outputs == 1 else list(expected)
    runtime = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found = runtime.run(None, {"x": x.numpy()})
    worst = max(
        float((torch.from_numpy(f) - e.detach()).abs().max() / e.detach().abs().max())
        for f, e in zip(found, expected, strict=True)
    )
    return Counter(node.op_type for node in model.graph), worst


def test_rms_norms_become_one_node_each() -> None:
    operators, worst = lowered(TwoNorms(), 30 * torch.randn(2, 5, 48), outputs=2)
    assert operators == {"RMSNormalization": 1, "Sin": 1, "SkipSimplifiedLayerNormalization": 1}
    assert worst < 2e-6


@pytest.mark.parametrize("size", [1e-3, 1.0, 6e4])
def test_the_channel_norm_becomes_layer_normalization(size: float) -> None:
    operators, worst = lowered(TokensOfNorm(), size * torch.randn(2, 32, 6, 5), outputs=1)
    assert operators == {"Reshape": 1, "Transpose": 1, "LayerNormalization": 1, "MatMul": 1}
    assert worst < 5e-6


def test_channel_norms_of_equal_weights_are_kept_apart() -> None:
    operators, worst = lowered(TwoEqualNorms(), torch.randn(2, 8, 6, 5), outputs=1)
    assert operators["LayerNormalization"] == 2
    assert worst < 5e-6


def test_large_transposed_weights_are_folded() -> None:
    operators, worst = lowered(nn.Linear(1200, 1000), torch.randn(2, 3, 1200), outputs=1)
    assert operators == {"MatMul": 1, "Add": 1}
    assert worst < 2e-6


def test_large_graphs_spread_over_data_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "INLINE_LIMIT", 100_000)
    monkeypatch.setattr(onnx_files, "CHUNK_LIMIT", 150_000)
    rng = np.random.default_rng(0)
    # 80 + 80 > 150 kB; the 240 kB one is larger than a chunk may be.
    sizes = {"a": (100, 200), "b": (200, 100), "c": (100, 600), "d": (600, 3)}
    weights = {name: rng.standard_normal(s, dtype=np.float32) for name, s in sizes.items()}
    nodes, last = [], "x"
    for name in weights:
        nodes.append(onnx.helper.make_node("MatMul", [last, name], [f"x{name}"]))
        last = f"x{name}"
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "chain",
        [tensor("x", onnx.TensorProto.FLOAT, [1, 100])],
        [tensor(last, onnx.TensorProto.FLOAT, [1, 3])],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path / "graph.onnx"
    assert onnx_files.save(ir.from_proto(proto), path) == 4
    names = [path.name, *(f"{path.name}_data{end}" for end in ("", "_1", "_2", "_3"))]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    assert path.stat().st_size < 2_000
    x = rng.standard_normal((1, 100), dtype=np.float32)
    (found,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for value in weights.values():
        x = x @ value
    assert np.abs(found - x).max() / np.abs(x).max() < 1e-5
