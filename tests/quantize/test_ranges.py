"""The range scan: what it must see, on modules whose magnitudes are known."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvlm_export.exporter import graphs
from fastvlm_export.exporter.model.attention_op import cached_attention
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.quantize.ranges import OpRange, scan


def ranges(module: nn.Module, *batches: tuple[Tensor, ...]) -> dict[str, OpRange]:
    """By operator; none that the tests read is used twice."""
    program = torch.export.export(module.eval(), batches[0])
    return {r.op: r for r in scan(program, batches, lambda _: None)}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        self.inner.requires_grad_(False)
        self.inner[0].weight.copy_(torch.tensor([[3.0, -7.0]]))
        self.inner[0].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) - 1.0


def test_magnitudes_are_the_largest_of_all_batches_and_weights() -> None:
    found = ranges(Named(), (torch.tensor([[1.0, 5.0]]),), (torch.tensor([[2.0, 0.0]]),))
    linear, relu = found["aten.linear.default"], found["aten.relu.default"]
    assert (linear.entering, linear.leaving) == (7.0, 32.0)  # a weight of -7; 3 - 35
    assert (relu.entering, relu.leaving) == (32.0, 6.0)  # the second batch gives 6
    assert (found["aten.sub.Tensor"].entering, found["aten.sub.Tensor"].leaving) == (6.0, 5.0)
    assert (linear.node, linear.layer) == ("linear", "inner.0")
    assert (relu.layer, found["aten.sub.Tensor"].layer) == ("inner.1", "")


def test_nan_and_infinity_show() -> None:
    broken = torch.tensor([[math.nan, 1.0]])
    for batches in ([broken, torch.ones(1, 2)], [torch.ones(1, 2), broken]):
        found = ranges(Named(), *((x,) for x in batches))
        assert math.isnan(found["aten.linear.default"].entering)
        assert math.isnan(found["aten.linear.default"].leaving)
        assert not found["aten.linear.default"].within(math.inf)
    found = ranges(Named(), (torch.tensor([[math.inf, 1.0]]),))
    assert found["aten.relu.default"].leaving == math.inf
    assert not found["aten.relu.default"].within(65504)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


def test_a_mean_counts_its_sum() -> None:
    found = ranges(Mean(), (torch.full((2, 3, 4, 5), -2.0),))
    assert found["aten.mean.dim"].leaving == 40.0


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


def test_attention_counts_its_scores() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    query[1, 2, 3], key[1, 2, 4] = 50.0, -60.0
    found = ranges(Attention(), (query, key, value))
    (attention,) = found.values()
    assert attention.entering == 60.0
    assert math.isclose(attention.leaving, 50 * 60 * 16 / 4, rel_tol=1e-6)


class Cached(nn.Module):
    def forward(self, x: Tensor, past: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        heads, kv_heads = 4, 2
        key = x[..., :8]
        out: Tensor = cached_attention(
            x, key, key, past, past, mask, table, table, heads, kv_heads
        )[0]
        return out


def test_cached_attention_counts_the_scores_of_past_keys() -> None:
    past = torch.zeros(1, 2, 3, 4)
    past[0, 1, 2] = 30.0  # a key of length 60 for heads 2 and 3
    x = torch.zeros(1, 2, 16)
    x[0, 0, :4] = 70.0  # a query of length 140 for head 0, which does not see that key
    x[0, 1, 12:] = 7.0  # one of length 14 for head 3
    found = ranges(Cached(), (x, past, torch.ones(1, 5, dtype=torch.int64), torch.ones(8, 2)))
    attention = found["fastvlm.cached_attention.default"]
    # Head 0's own new key is as long as its query: 140 * 140 / 2.
    assert math.isclose(attention.leaving, 9800.0, rel_tol=1e-6)
    x[0, 0, :4] = 0.0
    found = ranges(Cached(), (x, past, torch.ones(1, 5, dtype=torch.int64), torch.ones(8, 2)))
    attention = found["fastvlm.cached_attention.default"]
    assert math.isclose(attention.leaving, 60 * 14 / 2, rel_tol=1e-6)


def test_every_layer_of_the_tower_is_seen(tiny: FastVLM) -> None:
    model = reparameterize(tiny).model
    graph = graphs.build(model, resolution=128, context=16, image_token_id=130)["vision"]
    said: list[str] = []
    program = graphs.export_program(graph)
    found = scan(program, [(torch.rand(1, 3, 128, 128),)] * 2, said.append)
    assert len(said) == 2
    layers = {r.layer for r in found if "conv2d" in r.op or "linear" in r.op}
    with_weights = {
        name
        for name, module in graph.module.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert layers == with_weights
    assert all(0 <= r.entering < 1e3 and 0 <= r.leaving < 1e3 for r in found)
