"""Activations rounded around a zero point per token: the definition, and XNNPACK's own integers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm_export.quantize.ops import AFFINE, quantized_linear, round_activations, round_affine
from fastvlm_export.quantize.runnable import runnable

WIDTH, ROWS = 64, 400


def rows() -> dict[str, Tensor]:
    """Tokens [ROWS,WIDTH] that rounding could go wrong with, by what is special about them."""
    source = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, WIDTH, generator=source)
    share = torch.rand(ROWS, WIDTH, generator=source)
    factor = torch.randn(ROWS, 1, generator=source)
    whole = torch.randint(-128, 128, (ROWS, WIDTH), generator=source).float()
    halfway = whole / 4 + 0.125  # with 31.75 and -32 beside them a step is 1/4
    halfway[:, 0], halfway[:, 1] = 31.75, -32.0
    single = torch.zeros(ROWS, WIDTH)
    single[torch.arange(ROWS), torch.randint(0, WIDTH, (ROWS,), generator=source)] = factor[:, 0]
    return {
        "normal": normal,
        "of all sizes": normal * torch.exp(8 * factor),
        "zeros": torch.zeros(ROWS, WIDTH),
        "positive": share + 3,
        "negative": -share - 3,
        "from zero": share,
        "shifted": normal + 3 * factor,
        "huge": normal * 1e37,
        "tiny": normal * 1e-30,
        "too small for a scale": normal * 1e-39,
        "integers": whole,
        "halfway": halfway.clamp(-32, 31.75),
        "all alike": factor.expand(ROWS, WIDTH).contiguous(),
        "one of many": single,
    }


def one_by_one(x: list[float]) -> list[float]:
    """`round_affine` of a token, number by number, in float64 but for its scale."""
    low, high = min(0.0, *x), max(0.0, *x)
    if low == high:
        return [0.0] * len(x)
    inverse = (torch.tensor(255.0) / torch.tensor(high - low)).item()
    ends = -128 - low * inverse, 127 - high * inverse
    zero = ends[0] if abs(low) < abs(high) else ends[1]
    zero = round(min(max(zero, -128), 127))
    return [(min(max(round(v * inverse) + zero, -128), 127) - zero) / inverse for v in x]


def test_it_is_what_its_docstring_says() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 3 + 1
    expected = torch.tensor([one_by_one(token) for token in x.tolist()])
    torch.testing.assert_close(round_affine(x), expected, rtol=1e-6, atol=0)


def test_every_token_is_off_by_half_a_step_at_most() -> None:
    for kind, x in rows().items():
        low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        step = (high - low)[:, None].double() / 255
        off = (round_affine(x).double() - x.double()).abs()
        # A zero point is rounded itself: at the far end of the range that is half a step more.
        assert (off <= 1.001 * step + 1e-37).all(), kind
        assert (round_affine(x)[x == 0] == 0).all(), kind


def test_half_precision_is_rounded_in_float32() -> None:
    x = rows()["shifted"].half()
    assert torch.equal(round_activations(x, AFFINE), round_affine(x.float()).half())


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(2)
        weight = torch.randint(-127, 128, (5, WIDTH), dtype=torch.int8, generator=source)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.rand(5, 1, generator=source))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = quantized_linear(x, self.weight, self.scale, None, None, 8, AFFINE)
        return out


def test_programs_round_them_unless_asked_to_be_exact() -> None:
    layer, x = _Linear(), rows()["shifted"]
    program = torch.export.export(layer, (x,), strict=False)
    weight = layer.weight.float() * layer.scale
    torch.testing.assert_close(runnable(program)(x)[0], F.linear(round_affine(x), weight))
    torch.testing.assert_close(runnable(program, exact=True)(x)[0], F.linear(x, weight))


def test_xnnpack_rounds_to_the_same_integers() -> None:
    """Weights of one and zero give each token's integers back, times its scale: equal bits."""
    pytest.importorskip("executorch", reason="needs executorch")
    from fastvlm_export.quantize.quiet import quiet_import  # noqa: PLC0415
    from fastvlm_export.targets import executorch_backends, executorch_lowering  # noqa: PLC0415
    from fastvlm_export.targets.executorch_linear import affine_linear  # noqa: PLC0415
    from fastvlm_export.targets.executorch_model import VISION, Backend  # noqa: PLC0415

    with quiet_import():
        from executorch.extension.pybindings import portable_lib  # noqa: PLC0415

    class Identity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.eye(WIDTH, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(WIDTH, 1))

        def forward(self, x: Tensor) -> Tensor:
            return affine_linear(x, self.weight, self.scale, None, 8)

    found = rows()
    x = torch.cat(list(found.values()))
    with torch.no_grad():
        program = torch.export.export(Identity(), (x,), strict=False)
    partitioners = {VISION: executorch_backends.partitioners(Backend.XNNPACK, VISION)}
    pte = executorch_lowering.lower({VISION: program}, partitioners, {}).pte
    module = portable_lib._load_for_executorch_from_buffer(pte)
    got = module.run_method(VISION, [x])[0]
    for kind, theirs, ours in zip(found, got.split(ROWS), round_affine(x).split(ROWS), strict=True):
        assert torch.equal(theirs, ours), (kind, (theirs - ours).abs().max())
