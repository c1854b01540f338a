"""Each operation on floats against PyTorch or its formula, in fp32, fp16 and without rounding."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastvlm_export.validate.mil import open_model

from .programs import mb, normal, run, save


@dataclass(frozen=True)
class Case:
    """`build(k, *inputs)` makes the program (k makes a constant of the inputs' type)."""

    name: str
    build: Callable[..., Any]
    expected: Callable[..., Any]
    inputs: tuple[Any, ...]


X = normal(2, 3, 5)
Y = normal(2, 3, 5, seed=1)
ROW = normal(5, seed=2)
IMAGE = normal(2, 4, 9, 8, seed=3)
POSITIVE = np.abs(X) + 0.2
WIDE = X * 40


def unary(name: str, expected: Callable[[Tensor], Tensor], x: Any = X, **parameters: Any) -> Case:
    return Case(
        name,
        lambda k, x: getattr(mb, name)(
            x=x, **{n: v if isinstance(v, str) else k(v) for n, v in parameters.items()}
        ),
        expected,
        (x,),
    )


def binary(name: str, expected: Callable[..., Tensor], x: Any = X, y: Any = Y) -> Case:
    return Case(name, lambda k, x, y: getattr(mb, name)(x=x, y=y), expected, (x, y))


UNARY = [
    unary("abs", torch.abs),
    unary("acos", torch.acos, X.clip(-0.99, 0.99)),
    unary("asin", torch.asin, X.clip(-0.99, 0.99)),
    unary("atan", torch.atan),
    unary("atanh", torch.atanh, X.clip(-0.99, 0.99)),
    unary("ceil", torch.ceil),
    unary("cos", torch.cos),
    unary("cosh", torch.cosh),
    unary("erf", torch.erf),
    unary("exp", torch.exp),
    unary("exp2", torch.exp2),
    unary("floor", torch.floor),
    unary("relu", lambda x: x.clamp(min=0)),
    unary("relu6", lambda x: x.clamp(0, 6), WIDE),
    unary("round", torch.round, np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1.2], np.float32)),
    unary("sigmoid", torch.sigmoid, WIDE),
    unary("sign", torch.sign),
    unary("silu", lambda x: x * torch.sigmoid(x)),
    unary("sin", torch.sin),
    unary("sinh", torch.sinh),
    unary("softplus", lambda x: torch.log(1 + torch.exp(x.double())).float(), WIDE),
    unary("softsign", lambda x: x / (1 + x.abs())),
    unary("sqrt", torch.sqrt, POSITIVE),
    unary("square", lambda x: x * x),
    unary("tan", torch.tan),
    unary("tanh", torch.tanh),
    unary("inverse", lambda x: 1 / (x + 0.25), POSITIVE, epsilon=0.25),
    unary("log", lambda x: torch.log(x + 0.5), POSITIVE, epsilon=0.5),
    unary("rsqrt", lambda x: 1 / torch.sqrt(x + 0.5), POSITIVE, epsilon=0.5),
    unary("inverse", lambda x: 1 / (x + 1e-4), POSITIVE),
    unary("log", torch.log, POSITIVE),
    unary("rsqrt", torch.rsqrt, POSITIVE),
    unary("clamped_relu", lambda x: torch.minimum(torch.tensor(1.0),
          torch.where(x >= 0, x, 0.5 * x)), alpha=0.5, beta=1.0),
    unary("clip", lambda x: x.clamp(-0.5, 0.75), alpha=-0.5, beta=0.75),
    unary("elu", lambda x: torch.where(x > 0, x, 0.5 * (torch.exp(x) - 1)), alpha=0.5),
    unary("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), mode="EXACT"),
    unary("gelu", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi)
          * (x + 0.044715 * x**3))), mode="TANH_APPROXIMATION"),
    unary("gelu", lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    unary("leaky_relu", lambda x: torch.where(x >= 0, x, 0.25 * x), alpha=0.25),
    unary("linear_activation", lambda x: 0.5 * x + 2, alpha=0.5, beta=2.0),
    unary("scaled_tanh", lambda x: 0.5 * torch.tanh(2 * x), alpha=0.5, beta=2.0),
    unary("sigmoid_hard", lambda x: (0.25 * x + 0.5).clamp(0, 1), WIDE, alpha=0.25, beta=0.5),
    unary("threshold", lambda x: x.clamp(min=0.25), alpha=0.25),
    unary("thresholded_relu", lambda x: torch.where(x >= 0.25, x, 0), alpha=0.25),
    unary("prelu", lambda x: torch.where(x > 0, x,
          x * torch.tensor([0.5, 2, -1, 0]).reshape(1, 4, 1, 1)),
          IMAGE, alpha=[0.5, 2.0, -1.0, 0.0]),
    unary("softplus_parametric", lambda x: torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1, 1)
          * torch.log(1 + torch.exp(x * torch.tensor([1.0, 0.5, 2, -1]).reshape(1, 4, 1, 1))),
          IMAGE, alpha=[1.0, 2.0, 3.0, 4.0], beta=[1.0, 0.5, 2.0, -1.0]),
]  # fmt: skip

BINARY = [
    binary("add", lambda x, y: x + y, y=ROW),
    binary("sub", lambda x, y: x - y, y=ROW),
    binary("mul", lambda x, y: x * y, y=ROW),
    binary("real_div", lambda x, y: x / y),
    binary("floor_div", lambda x, y: torch.floor(x / y), X * 8),
    binary("mod", lambda x, y: x - torch.floor(x / y) * y, np.round(X * 8), np.round(Y) * 2 + 0.5),
    binary("pow", lambda x, y: x**y, POSITIVE),
    binary("maximum", torch.maximum),
    binary("minimum", torch.minimum, y=ROW),
    Case("select", lambda k, x, y: mb.select(cond=mb.greater(x=x, y=y), a=x, b=y),
         torch.maximum, (X, Y)),
]  # fmt: skip


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + (0 if mask is None else mask), -1) @ v


Q, K, V = normal(1, 2, 4, 8), normal(1, 2, 6, 8, seed=1), normal(1, 2, 6, 5, seed=2)
MASK = normal(4, 6, seed=3)
KEPT = np.tril(np.ones((4, 6), bool), 2)

LINEAR = [
    Case("matmul", lambda k, x, y: mb.matmul(x=x, y=y), torch.matmul,
         (normal(3, 4, 5), normal(2, 1, 5, 6, seed=1))),
    Case("matmul transposed", lambda k, x, y: mb.matmul(x=x, y=y, transpose_x=True,
         transpose_y=True), lambda x, y: x.mT @ y.mT, (normal(5, 4), normal(6, 5, seed=1))),
    Case("matmul of a column", lambda k, x, y: mb.matmul(x=x, y=y), torch.matmul,
         (normal(4, 5), normal(5, 1, seed=1))),
    Case("linear", lambda k, x: mb.linear(x=x, weight=k(K[0, 0]), bias=k(MASK[0])),
         lambda x: x @ torch.from_numpy(K[0, 0]).T + torch.from_numpy(MASK[0]), (Q[0],)),
    Case("linear without bias", lambda k, x: mb.linear(x=x, weight=k(K[0, 0])),
         lambda x: x @ torch.from_numpy(K[0, 0]).T, (Q[0],)),
    Case("einsum", lambda k, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
         lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
         (normal(2, 3, 4, 5), normal(2, 5, 4, 6, seed=1))),
    Case("attention", lambda k, q, key, v: mb.scaled_dot_product_attention(
         query=q, key=key, value=v), attention, (Q, K, V)),
    Case("attention with a mask", lambda k, q, key, v: mb.scaled_dot_product_attention(
         query=q, key=key, value=v, attn_mask=k(MASK)),
         lambda q, k, v: attention(q, k, v, torch.from_numpy(MASK)), (Q, K, V)),
    Case("attention with a bool mask", lambda k, q, key, v: mb.scaled_dot_product_attention(
         query=q, key=key, value=v, attn_mask=KEPT),
         lambda q, k, v: attention(q, k, v, torch.where(torch.from_numpy(KEPT), 0.0, -torch.inf)),
         (Q, K, V)),
]  # fmt: skip


def numbers(*shape: int, seed: int = 9) -> Tensor:
    return torch.from_numpy(normal(*shape, seed=seed))


def conv(
    expected: Callable[[Tensor], Tensor], weight: Tensor, x: Any = IMAGE, **parameters: Any
) -> Case:
    bias = parameters.pop("bias", None)
    return Case(
        f"conv {parameters}",
        lambda k, x: mb.conv(
            x=x, weight=k(weight), **({} if bias is None else {"bias": k(bias)}), **parameters
        ),
        expected,
        (x,),
    )


def conv_transpose(
    expected: Callable[[Tensor], Tensor], weight: Tensor, x: Any = IMAGE, **parameters: Any
) -> Case:
    return Case(
        f"conv_transpose {parameters}",
        lambda k, x: mb.conv_transpose(x=x, weight=k(weight), bias=k([0.5] * 6), **parameters),
        lambda x: expected(x) + 0.5,
        (x,),
    )


W3, W2, DEEP = numbers(6, 4, 3, 3), numbers(6, 4, 2, 4), numbers(8, 1, 3, 3)
CONVOLUTIONS = [
    conv(lambda x: F.conv2d(x, W3, torch.arange(6.0)), W3, bias=torch.arange(6.0)),
    conv(lambda x: F.conv2d(x, W3, stride=(2, 1), padding=(1, 2)), W3, strides=[2, 1],
         pad_type="custom", pad=[1, 1, 2, 2]),
    conv(lambda x: F.conv2d(F.pad(x, (3, 0, 1, 2)), W3), W3, pad_type="custom", pad=[1, 2, 3, 0]),
    conv(lambda x: F.conv2d(x, W3, dilation=2, padding=2), W3, dilations=[2, 2], pad_type="same"),
    conv(lambda x: F.conv2d(F.pad(x, (1, 2, 0, 1)), W2), W2, pad_type="same"),
    conv(lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), W2), W2, pad_type="same_lower"),
    # 9 rows by 2: both ends; 8 columns by 2: one more after.
    conv(lambda x: F.conv2d(F.pad(x, (0, 1, 1, 1)), W3, stride=2), W3, pad_type="same",
         strides=[2, 2]),
    conv(lambda x: F.conv2d(x, DEEP, groups=4), DEEP, groups=4),
    conv(lambda x: F.conv1d(x, W3[..., 0], padding=1), W3[..., 0], normal(2, 4, 7),
         pad_type="custom", pad=[1, 1]),
    conv(lambda x: F.conv3d(x, numbers(3, 2, 2, 2, 2)), numbers(3, 2, 2, 2, 2),
         normal(1, 2, 4, 4, 4)),
    conv_transpose(lambda x: F.conv_transpose2d(x, W3.transpose(0, 1)), W3.transpose(0, 1)),
    conv_transpose(lambda x: F.conv_transpose2d(x, W3.transpose(0, 1), stride=2, padding=1),
                   W3.transpose(0, 1), strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1]),
    conv_transpose(lambda x: F.conv_transpose2d(x, W3.transpose(0, 1), stride=2, padding=1,
                   output_padding=1), W3.transpose(0, 1), strides=[2, 2], pad_type="custom",
                   pad=[1, 1, 1, 1], output_shape=[2, 6, 18, 16]),
    conv_transpose(lambda x: F.conv_transpose2d(x, W3.transpose(0, 1), stride=2)[:, :, :-1, :-1],
                   W3.transpose(0, 1), strides=[2, 2], pad_type="same"),
    conv_transpose(lambda x: F.conv_transpose2d(x, numbers(4, 3, 2, 2), groups=2),
                   numbers(4, 3, 2, 2), groups=2),
]  # fmt: skip

CUBE = normal(2, 3, 4, 5, seed=5)
GAMMA, BETA = [1.0, 2.0, -1.0], [0.5, 0.0, 3.0]


def moments(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(axes, keepdim=True) + 0.125)


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1)


def reduction(name: str, expected: Callable[..., Tensor], x: Any = CUBE) -> list[Case]:
    return [
        Case(f"{name} {axes} {keep}",
             lambda k, x, axes=axes, keep=keep: getattr(mb, name)(x=x, axes=axes, keep_dims=keep),
             lambda x, axes=axes, keep=keep: expected(x, tuple(axes), keep), (x,))
        for axes, keep in (([1], False), ([-1, 0], True), ([0, 1, 2, 3], False))
    ]  # fmt: skip


def product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.tensor(np.prod(x.numpy(), axis=axes, keepdims=keep))


REDUCTIONS = [
    *reduction("reduce_sum", lambda x, a, k: x.sum(a, keepdim=k)),
    *reduction("reduce_mean", lambda x, a, k: x.mean(a, keepdim=k)),
    *reduction("reduce_max", lambda x, a, k: x.amax(a, keepdim=k)),
    *reduction("reduce_min", lambda x, a, k: x.amin(a, keepdim=k)),
    *reduction("reduce_prod", product, (1 + 0.1 * CUBE).astype(np.float32)),
    *reduction("reduce_l1_norm", lambda x, a, k: x.abs().sum(a, keepdim=k)),
    *reduction("reduce_l2_norm", lambda x, a, k: (x * x).sum(a, keepdim=k).sqrt()),
    *reduction("reduce_sum_square", lambda x, a, k: (x * x).sum(a, keepdim=k)),
    *reduction("reduce_log_sum", lambda x, a, k: x.sum(a, keepdim=k).log(), np.abs(CUBE)),
    *reduction("reduce_log_sum_exp", lambda x, a, k: x.exp().sum(a, keepdim=k).log()),
    Case("reduce all", lambda k, x: mb.reduce_sum(x=x), torch.sum, (CUBE,)),
    Case("softmax", lambda k, x: mb.softmax(x=x, axis=1),
         lambda x: x.exp() / x.exp().sum(1, keepdim=True), (CUBE,)),
    Case("cumsum", lambda k, x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), (CUBE,)),
    Case("cumsum exclusive reverse",
         lambda k, x: mb.cumsum(x=x, axis=-1, exclusive=True, reverse=True),
         lambda x: x.flip(-1).cumsum(-1).flip(-1) - x, (CUBE,)),
    Case("layer_norm last", lambda k, x: mb.layer_norm(x=x, axes=[-1], gamma=k(ROW),
         beta=k(-ROW), epsilon=k(0.125)),
         lambda x: moments(x, (3,)) * torch.from_numpy(ROW) - torch.from_numpy(ROW), (CUBE,)),
    Case("layer_norm two", lambda k, x: mb.layer_norm(x=x, axes=[2, 3], epsilon=k(0.125)),
         lambda x: moments(x, (2, 3)), (CUBE,)),
    Case("layer_norm of channels", lambda k, x: mb.layer_norm(x=x, axes=[1], gamma=k(GAMMA),
         beta=k(BETA), epsilon=k(0.125)),
         lambda x: moments(x, (1,)) * channels(GAMMA) + channels(BETA), (CUBE,)),
    Case("batch_norm", lambda k, x: mb.batch_norm(x=x, mean=k(BETA), variance=k([1.0, 4.0, 0.5]),
         gamma=k(GAMMA), beta=k(BETA), epsilon=k(0.125)),
         lambda x: (x - channels(BETA)) / torch.sqrt(channels([1.0, 4.0, 0.5]) + 0.125)
         * channels(GAMMA) + channels(BETA), (CUBE,)),
    Case("instance_norm", lambda k, x: mb.instance_norm(x=x, gamma=k(GAMMA), beta=k(BETA),
         epsilon=k(0.125)),
         lambda x: moments(x, (2, 3)) * channels(GAMMA) + channels(BETA), (CUBE,)),
    Case("l2_norm", lambda k, x: mb.l2_norm(x=x, epsilon=k(0.125)),
         lambda x: x / torch.sqrt((x * x).sum((1, 2, 3), keepdim=True) + 0.125), (CUBE,)),
]  # fmt: skip


def pool(kind: str, expected: Callable[[Tensor], Tensor], **parameters: Any) -> Case:
    return Case(f"{kind} {parameters}", lambda k, x: getattr(mb, kind)(x=x, **parameters),
                expected, (IMAGE,))  # fmt: skip


IMAGES = [
    pool("max_pool", lambda x: F.max_pool2d(x, (3, 2), 2), kernel_sizes=[3, 2], strides=[2, 2],
         pad_type="valid"),
    pool("max_pool", lambda x: F.max_pool2d(x, 3, 2, 1), kernel_sizes=[3, 3], strides=[2, 2],
         pad_type="custom", pad=[1, 1, 1, 1]),
    pool("max_pool", lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), kernel_sizes=[3, 3],
         strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True),
    pool("avg_pool", lambda x: F.avg_pool2d(x, (3, 2), 2), kernel_sizes=[3, 2], strides=[2, 2],
         pad_type="valid"),
    pool("avg_pool", lambda x: F.avg_pool2d(x, 3, 2, 1), kernel_sizes=[3, 3], strides=[2, 2],
         pad_type="custom", pad=[1, 1, 1, 1]),
    pool("avg_pool", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
         kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[1, 1, 1, 1],
         exclude_padding_from_average=True),
    pool("avg_pool", lambda x: F.avg_pool2d(x, 3, 3, 1, ceil_mode=True), kernel_sizes=[3, 3],
         strides=[3, 3], pad_type="custom", pad=[1, 1, 1, 1], ceil_mode=True),
    pool("avg_pool", lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False),
         kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid", ceil_mode=True,
         exclude_padding_from_average=True),
    pool("avg_pool", lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1), kernel_sizes=[2, 2],
         pad_type="same"),
    pool("l2_pool", lambda x: F.lp_pool2d(x, 2, 3, 2), kernel_sizes=[3, 3], strides=[2, 2],
         pad_type="valid"),
    Case("upsample_nearest", lambda k, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2,
         scale_factor_width=3), lambda x: F.interpolate(x, scale_factor=(2.0, 3.0)), (IMAGE,)),
    Case("resize_nearest", lambda k, x: mb.resize_nearest_neighbor(x=x, target_size_height=18,
         target_size_width=4), lambda x: F.interpolate(x, size=(18, 4)), (IMAGE,)),
    Case("upsample_bilinear", lambda k, x: mb.upsample_bilinear(x=x, scale_factor_height=2,
         scale_factor_width=2, align_corners=False),
         lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (IMAGE,)),
    Case("upsample_bilinear aligned", lambda k, x: mb.upsample_bilinear(x=x,
         scale_factor_height=2, scale_factor_width=2, align_corners=True),
         lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
         (IMAGE,)),
    *[
        Case(f"resize_bilinear {mode}", lambda k, x, mode=mode: mb.resize_bilinear(
             x=x, target_size_height=1, target_size_width=5, sampling_mode=mode),
             lambda x, points=points: torch.tensor(points).reshape(1, 1, 1, 5),
             (np.array([[[[0.0, 1.0]]]], np.float32),), )
        # coremltools' own examples, of a line from 0 to 1.
        for mode, points in (("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]),
                             ("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
                             ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]),
                             ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]))
    ],
]  # fmt: skip

GROUPS = {
    "unary": UNARY,
    "binary": BINARY,
    "linear": LINEAR,
    "convolutions": CONVOLUTIONS,
    "reductions": REDUCTIONS,
    "images": IMAGES,
}


def run_group(
    folder: Path, cases: list[Case], dtype: type[np.floating[Any]], *, exact: bool = False
) -> list[Any]:
    """All cases of a group as one program; the results in order."""
    inputs = {
        f"i{at}_{number}": np.asarray(array, dtype)
        for at, case in enumerate(cases)
        for number, array in enumerate(case.inputs)
    }

    def constant(value: Any) -> Any:
        return np.asarray(value, dtype)

    def build(*tensors: Any) -> Any:
        named = dict(zip(inputs, tensors, strict=True))
        return tuple(
            case.build(constant, *(named[f"i{at}_{n}"] for n in range(len(case.inputs))))
            for at, case in enumerate(cases)
        )

    return run(folder, build, inputs, exact=exact)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "exact fp16"])
def test_operations_compute_their_formula(group: str, kind: str, tmp_path: Path) -> None:
    cases = GROUPS[group]
    dtype = np.float32 if kind == "fp32" else np.float16
    results = run_group(tmp_path, cases, dtype, exact=kind.startswith("exact"))
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        given = [torch.from_numpy(np.asarray(x, dtype)).float() for x in case.inputs]
        expected = case.expected(*given)
        assert result.dtype == (np.float16 if kind == "fp16" else np.float32), case.name
        # Typed, a result is the nearest float16 of the float32 one: half a step is 2^-11.
        rtol = 1e-3 if kind == "fp16" else 1e-5
        torch.testing.assert_close(
            torch.from_numpy(result).float().reshape(expected.shape),
            expected,
            rtol=rtol,
            atol=1e-5,
            msg=lambda text, case=case: f"{case.name}: {text}",
        )


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_no_key_is_no_number(tmp_path: Path, kind: str) -> None:
    kept = KEPT.copy()
    kept[1] = False
    mask = kept if kind == "bool" else np.where(kept, 0, -np.inf).astype(np.float32)

    def build(q: Any, k: Any, v: Any) -> Any:
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)

    (result,) = run(tmp_path, build, {"q": Q, "k": K, "v": V})
    assert np.isnan(result[:, :, 1]).all() and not np.isnan(result[:, :, [0, 2, 3]]).any()


def test_keys_that_nobody_sees_count_only_where_they_are_infinite(tmp_path: Path) -> None:
    """0 times infinity is no number on a device, so it must not be here."""
    kept = KEPT.copy()
    kept[:, 4:] = False

    def build(q: Any, k: Any, v: Any) -> Any:
        return mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=kept)

    model = open_model(save(tmp_path, build, {"q": Q, "k": K, "v": V}), "main")
    (result,) = model.predict({"q": Q, "k": K, "v": V}).values()
    mask = torch.where(torch.from_numpy(kept), 0.0, -torch.inf)
    expected = attention(*map(torch.from_numpy, (Q, K, V)), mask)
    torch.testing.assert_close(torch.from_numpy(result), expected)
    broken = V.copy()
    broken[:, :, 5] = np.inf
    (result,) = model.predict({"q": Q, "k": K, "v": broken}).values()
    assert np.isnan(result).all()
