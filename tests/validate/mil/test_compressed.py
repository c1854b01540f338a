"""Compressed weights and quantized activations: typed, and exact without any rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm_export.validate.mil import open_model

from .programs import Array, ct, mb, normal, run, save, types

RNG = np.random.default_rng(0)


def integers(low: int, high: int, *shape: int) -> Array:
    return RNG.integers(low, high, shape, endpoint=True)


def decompressed(tmp_path: Path, build: Any, *, exact: bool = False, target: Any = None) -> Array:
    """What a program makes of its weights, which it adds to a zero."""
    half = np.zeros(1, np.float16)

    def program(x: Any) -> Any:
        return mb.add(x=x, y=build())

    target = target or ct.target.iOS18
    return run(tmp_path, program, {"x": half}, exact=exact, target=target)[0]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("int4", -8, 7), ("uint4", 0, 15), ("int8", -128, 127), ("uint8", 0, 255)],
)
@pytest.mark.parametrize("blocks", [(6, 1), (3, 4), (1, 8), (1, 1)])
def test_blockwise_shift_scale(
    tmp_path: Path, kind: str, low: int, high: int, blocks: tuple[int, int], exact: bool
) -> None:
    numpy_type = types.nptype_from_builtin(types.string_to_builtin(kind))
    data = integers(low, high, 6, 8).astype(numpy_type)
    scale = (np.abs(normal(*blocks)) * 0.1 + 0.01).astype(np.float16)
    offset = integers(max(low, -3), 3, *blocks).astype(numpy_type)
    result = decompressed(
        tmp_path,
        lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset),
        exact=exact,
    )
    spread = np.ones((6 // blocks[0], 8 // blocks[1]))
    steps = data.astype(np.float32) - np.kron(offset.astype(np.float32), spread)
    expected = (steps * np.kron(scale.astype(np.float32), spread)).astype(np.float32)
    np.testing.assert_array_equal(result, expected if exact else expected.astype(np.float16))


def test_blockwise_shift_scale_without_offset_on_an_inner_axis(tmp_path: Path) -> None:
    data = integers(-128, 127, 2, 6, 3).astype(np.int8)
    scale = np.abs(normal(1, 3, 3)).astype(np.float16)
    result = decompressed(
        tmp_path, lambda: mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
    )
    expected = data.astype(np.float32) * np.repeat(scale.astype(np.float32), 2, 1)
    np.testing.assert_array_equal(result, expected.astype(np.float16))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (2, 3)])
def test_lut_to_dense(tmp_path: Path, bits: int, groups: tuple[int, int]) -> None:
    kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))
    indices = integers(0, 2**bits - 1, 8, 9)
    table = normal(*groups, 2**bits, 1).astype(np.float16)
    result = decompressed(
        tmp_path, lambda: mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=table)
    )
    for i in range(8):
        for j in range(9):
            group = table[i // (8 // groups[0]), j // (9 // groups[1])]
            assert result[i, j] == group[indices[i, j], 0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_lut_to_dense_of_vectors(tmp_path: Path, axis: int) -> None:
    indices = integers(0, 3, 2, 4)
    table = normal(1, 2, 4, 3).astype(np.float16)
    kind = types.nptype_from_builtin(types.uint2)
    result = decompressed(
        tmp_path,
        lambda: mb.constexpr_lut_to_dense(
            indices=indices.astype(kind), lut=table, vector_axis=np.int32(axis)
        ),
    )
    assert result.shape == ((6, 4) if axis == 0 else (2, 12))
    for i in range(2):
        for j in range(4):
            vector = table[0, j // 2, indices[i, j]]
            found = result[3 * i : 3 * i + 3, j] if axis == 0 else result[i, 3 * j : 3 * j + 3]
            np.testing.assert_array_equal(found, vector)


def test_palette_of_integers_with_a_scale(tmp_path: Path) -> None:
    indices = integers(0, 15, 4, 6).astype(types.nptype_from_builtin(types.uint4))
    table = integers(-128, 127, 1, 1, 16, 1).astype(np.int8)
    scale = np.abs(normal(4, 1)).astype(np.float16)

    def build() -> Any:
        palette = mb.constexpr_lut_to_dense(indices=indices, lut=table)
        return mb.constexpr_blockwise_shift_scale(data=palette, scale=scale)

    expected = table[0, 0, indices.astype(int), 0].astype(np.float32) * scale.astype(np.float32)
    result = decompressed(tmp_path, build)
    np.testing.assert_array_equal(result, expected.astype(np.float16))


def test_sparse_to_dense(tmp_path: Path) -> None:
    mask = integers(0, 1, 5, 7)
    values = normal(int(mask.sum())).astype(np.float16)
    kind = types.nptype_from_builtin(types.uint1)
    result = decompressed(
        tmp_path,
        lambda: mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask.astype(kind)),
    )
    expected = np.zeros((5, 7), np.float16)
    expected[mask != 0] = values
    np.testing.assert_array_equal(result, expected)


def test_sparse_with_scale_and_with_palette(tmp_path: Path) -> None:
    mask = integers(0, 1, 4, 8)
    count = int(mask.sum())
    bit = types.nptype_from_builtin(types.uint1)
    steps = integers(-128, 127, count).astype(np.int8)
    scale = np.abs(normal(4, 2)).astype(np.float16)
    indices = integers(0, 3, count)
    table = normal(2, 1, 4, 1).astype(np.float16)

    def scaled() -> Any:
        chosen, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask.astype(bit), nonzero_data=steps, scale=scale
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=chosen)

    def looked_up() -> Any:
        chosen, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask.astype(bit),
            indices_nonzero_data=indices.astype(types.nptype_from_builtin(types.uint2)),
            lut=table,
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=chosen)

    dense = np.zeros((4, 8), np.float32)
    dense[mask != 0] = steps
    expected = (dense * np.repeat(scale.astype(np.float32), 4, 1)).astype(np.float16)
    np.testing.assert_array_equal(decompressed(tmp_path, scaled), expected)
    dense[mask != 0] = table[np.nonzero(mask)[0] // 2, 0, indices, 0]
    np.testing.assert_array_equal(decompressed(tmp_path, looked_up), dense.astype(np.float16))


def test_forms_of_ios16(tmp_path: Path) -> None:
    """Attributes instead of inputs, indices packed into bytes, zero points on an axis."""
    data = integers(0, 255, 4, 5).astype(np.uint8)
    scale = np.abs(normal(5)).astype(np.float16)
    zero = integers(0, 255, 5).astype(np.uint8)
    affine = decompressed(
        tmp_path,
        lambda: mb.constexpr_affine_dequantize(
            quantized_data=data, zero_point=zero, scale=scale, axis=np.int32(1)
        ),
        target=ct.target.iOS16,
    )
    expected = (data.astype(np.float32) - zero) * scale.astype(np.float32)
    np.testing.assert_array_equal(affine, expected.astype(np.float16))

    indices = integers(0, 63, 5, 7)
    digits = (indices.reshape(-1, 1) >> np.arange(6)) & 1
    packed = np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little")
    table = normal(64).astype(np.float16)
    dense = decompressed(
        tmp_path,
        lambda: mb.constexpr_lut_to_dense(
            indices=packed, lut=table, shape=np.array([5, 7], np.uint32)
        ),
        target=ct.target.iOS16,
    )
    np.testing.assert_array_equal(dense, table[indices])

    mask = integers(0, 1, 3, 7)
    values = normal(int(mask.sum())).astype(np.float16)
    sparse = decompressed(
        tmp_path,
        lambda: mb.constexpr_sparse_to_dense(
            nonzero_data=values,
            mask=np.packbits(mask.reshape(-1).astype(np.uint8), bitorder="little"),
            shape=np.array([3, 7], np.uint32),
        ),
        target=ct.target.iOS16,
    )
    whole = np.zeros((3, 7), np.float16)
    whole[mask != 0] = values
    np.testing.assert_array_equal(sparse, whole)


SCALE = np.float16(0.0625)


def quantized(x: Any) -> Any:
    return mb.quantize(input=x, scale=SCALE, zero_point=np.uint8(7), output_dtype="uint8")


def test_quantize_rounds_half_to_even_and_saturates(tmp_path: Path) -> None:
    steps = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300, 0.75], np.float16)

    def build(x: Any) -> Any:
        taken = quantized(x)
        return mb.cast(x=taken, dtype="int32"), mb.dequantize(
            input=taken, scale=SCALE, zero_point=np.uint8(7)
        )

    integer, back = run(tmp_path, build, {"x": steps * SCALE})
    np.testing.assert_array_equal(integer, [7, 9, 9, 7, 5, 255, 0, 8])
    np.testing.assert_array_equal(back, (np.array([0, 2, 2, 0, -2, 248, -7, 1]) * SCALE))


def test_exact_quantization_keeps_fractions_but_saturates(tmp_path: Path) -> None:
    steps = np.array([0.5, 1.25, -1.5, 300, -300], np.float16)

    def build(x: Any) -> Any:
        taken = mb.transpose(x=mb.expand_dims(x=quantized(x), axes=[0]), perm=[1, 0])
        return mb.dequantize(input=taken, scale=SCALE, zero_point=np.uint8(7))

    (back,) = run(tmp_path, build, {"x": steps * SCALE}, exact=True)
    expected = np.array([0.5, 1.25, -1.5, 248, -7]) * float(SCALE)
    np.testing.assert_array_equal(back[:, 0], expected.astype(np.float32))


def test_quantize_by_channel(tmp_path: Path) -> None:
    x = normal(2, 3, 4)
    scale = np.array([0.1, 0.02, 0.5], np.float32)
    zero = np.array([0, -5, 9], np.int8)

    def build(x: Any) -> Any:
        taken = mb.quantize(
            input=x, scale=scale, zero_point=zero, output_dtype="int8", axis=np.int32(1)
        )
        return mb.dequantize(input=taken, scale=scale, zero_point=zero, axis=np.int32(1))

    (result,) = run(tmp_path, build, {"x": x})
    s, z = scale.reshape(1, 3, 1), zero.reshape(1, 3, 1).astype(np.float32)
    expected = ((np.round(x / s) + z).clip(-128, 127) - z) * s
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_overflow_shows_in_float16_and_not_exact(tmp_path: Path) -> None:
    x = np.array([300.0, 3.0], np.float16)

    def build(x: Any) -> Any:
        return mb.real_div(x=mb.mul(x=x, y=np.float16(300)), y=np.float16(300))

    path = save(tmp_path, build, {"x": x})
    (typed,) = open_model(path, "main").predict({"x": x}).values()
    (exact,) = open_model(path, "main", exact=True).predict({"x": x}).values()
    np.testing.assert_array_equal(typed, [np.inf, 3.0])
    np.testing.assert_allclose(exact, [300.0, 3.0], rtol=1e-6)


def test_sums_are_float32_inside_an_operation(tmp_path: Path) -> None:
    """Float16 would stop at 2048, where 1 is lost."""
    x = np.ones((1, 4096), np.float16)

    def build(x: Any) -> Any:
        return (
            mb.reduce_mean(x=x, axes=[1]),
            mb.linear(x=x, weight=np.ones((1, 4096), np.float16)),
            mb.reduce_sum(x=x, axes=[1]),
        )

    mean, product, total = run(tmp_path, build, {"x": x})
    assert mean.item() == 1 and product.item() == 4096 and total.item() == 4096


def test_typed_results_are_rounded_after_each_operation(tmp_path: Path) -> None:
    x = normal(64).astype(np.float16)

    def build(x: Any) -> Any:
        return mb.sub(x=mb.mul(x=x, y=x), y=mb.square(x=x)), mb.exp(x=mb.mul(x=x, y=np.float16(3)))

    zero, grown = run(tmp_path, build, {"x": x})
    assert not zero.any()
    tripled = (torch.from_numpy(x).float() * 3).half().float()
    np.testing.assert_array_equal(grown, tripled.exp().half().numpy())
