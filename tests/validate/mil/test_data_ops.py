"""Operations that move, index, compare and count, against NumPy: results are equal, not close."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate.mil import open_model

from .programs import Array, ct, mb, normal, run, save


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[..., Any]
    expected: Callable[..., Any]
    inputs: tuple[Array, ...]


X = normal(2, 3, 4)
IDS = np.array([[2, 0, 1], [1, 1, 0]], np.int32)
INTS = np.array([[7, -7, 5], [-5, 0, 9]], np.int32)
DIVISORS = np.array([[2, 2, -3], [3, 4, -4]], np.int32)
FLAGS = np.array([[True, False, True], [False, False, True]])
TIED = np.array([[1, 3, 3, 2], [0, 0, -1, 5]], np.float32)

SHAPES = [
    Case("identity", lambda x: mb.identity(x=x), lambda x: x, (X,)),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, 6), (X,)),
    Case("reshape with 0", lambda x: mb.reshape(x=x, shape=[0, -1, 2]),
         lambda x: x.reshape(2, 6, 2), (X,)),
    Case("reshape by a tensor", lambda x: mb.reshape(x=x, shape=mb.shape(x=mb.transpose(
         x=x, perm=[2, 0, 1]))), lambda x: x.reshape(4, 2, 3), (X,)),
    Case("reshape_like", lambda x, y: mb.reshape_like(x=x, ref_tensors=(y, y), begins=(0, 0),
         ends=(2, 1), end_masks=(False, False)), lambda x, y: x.reshape(2, 3, 2)[..., :2],
         (normal(2, 3, 2), normal(2, 3, 4))),
    Case("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -2]),
         lambda x: x.transpose(2, 0, 1), (X,)),
    Case("squeeze", lambda x: mb.squeeze(x=x, axes=[1]), lambda x: x[:, 0], (normal(2, 1, 3, 1),)),
    Case("squeeze all", lambda x: mb.squeeze(x=x), np.squeeze, (normal(2, 1, 3, 1),)),
    Case("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, -1]),
         lambda x: x[None, ..., None], (X,)),
    Case("flatten2d", lambda x: mb.flatten2d(x=x, axis=2), lambda x: x.reshape(6, 4), (X,)),
    Case("flatten2d from the end", lambda x: mb.flatten2d(x=x, axis=-1),
         lambda x: x.reshape(6, 4), (X,)),
    Case("concat", lambda x: mb.concat(values=(x, mb.relu(x=x)), axis=1),
         lambda x: np.concatenate([x, x.clip(0)], 1), (X,)),
    Case("concat interleaved", lambda x: mb.concat(values=(x, mb.relu(x=x)), axis=1,
         interleave=True), lambda x: np.stack([x, x.clip(0)], 2).reshape(2, 6, 4), (X,)),
    Case("stack", lambda x: mb.stack(values=(x, mb.relu(x=x)), axis=-1),
         lambda x: np.stack([x, x.clip(0)], -1), (X,)),
    Case("split evenly", lambda x: mb.split(x=x, num_splits=2, axis=2)[1],
         lambda x: x[..., 2:], (X,)),
    Case("split by sizes", lambda x: mb.split(x=x, split_sizes=[1, 3], axis=-1)[1],
         lambda x: x[..., 1:], (X,)),
    Case("tile", lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: np.tile(x, (1, 2, 3)), (X,)),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=1.5),
         lambda x: np.pad(x, ((0, 0), (1, 2), (0, 3)), constant_values=1.5), (X,)),
    Case("pad reflect", lambda x: mb.pad(x=x, pad=[2, 1, 0, 3], mode="reflect"),
         lambda x: np.pad(x, ((0, 0), (2, 1), (0, 3)), "reflect"), (X,)),
    Case("pad replicate", lambda x: mb.pad(x=x, pad=[2, 1, 0, 3], mode="replicate"),
         lambda x: np.pad(x, ((0, 0), (2, 1), (0, 3)), "edge"), (X,)),
    Case("range_1d", lambda i: mb.range_1d(start=mb.squeeze(x=i), end=11, step=3),
         lambda i: np.arange(2, 11, 3, np.int32), (np.array([2], np.int32),)),
    Case("fill", lambda x: mb.fill(shape=[2, 3], value=2.5), lambda x: np.full((2, 3), 2.5,
         np.float32), (X,)),
    Case("fill by a tensor", lambda x: mb.fill(shape=mb.shape(x=x), value=7),
         lambda x: np.full((2, 3, 4), 7, np.int32), (X,)),
    Case("fill_like", lambda x: mb.fill_like(ref_tensor=x, value=1.5),
         lambda x: np.full(x.shape, 1.5, np.float32), (X,)),
    Case("shape", lambda x: mb.shape(x=x), lambda x: np.array(x.shape, np.int32), (X,)),
    Case("band_part", lambda x: mb.band_part(x=x, lower=1, upper=0),
         lambda x: np.triu(np.tril(x), -1), (normal(2, 4, 4),)),
    Case("band_part lower", lambda x: mb.band_part(x=x, lower=-1, upper=0), np.tril,
         (normal(2, 4, 4),)),
    Case("reverse", lambda x: mb.reverse(x=x, axes=[0, 2]), lambda x: x[::-1, :, ::-1], (X,)),
    Case("one_hot", lambda i: mb.one_hot(indices=i, one_hot_vector_size=3, axis=1, on_value=5,
         off_value=-1), lambda i: np.where(np.moveaxis(np.eye(3)[i], -1, 1) > 0, 5, -1), (IDS,)),
    Case("non_zero", lambda i: mb.non_zero(x=i), lambda i: np.argwhere(i).astype(np.int32),
         (IDS,)),
    Case("sliding_windows", lambda x: mb.sliding_windows(x=x, axis=2, size=2, stride=2),
         lambda x: x.reshape(2, 3, 2, 2), (X,)),
    Case("depth_to_space", lambda x: mb.depth_to_space(x=x, block_size=2),
         lambda x: np.block([[x[:, 0], x[:, 1]], [x[:, 2], x[:, 3]]])[:, None],
         (normal(1, 4, 1, 1),)),
    Case("space_to_depth", lambda x: mb.depth_to_space(x=mb.space_to_depth(x=x, block_size=2),
         block_size=2), lambda x: x, (normal(2, 3, 4, 6),)),
    Case("space_to_depth order", lambda x: mb.space_to_depth(x=x, block_size=2),
         lambda x: np.concatenate([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
         (normal(2, 3, 4, 6),)),
    Case("pixel_shuffle", lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
         lambda x: torch.pixel_shuffle(torch.from_numpy(x), 2).numpy(), (normal(1, 8, 2, 3),)),
    Case("pixel_unshuffle", lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)),
         lambda x: torch.pixel_unshuffle(torch.from_numpy(x), 2).numpy(), (normal(1, 2, 4, 6),)),
]  # fmt: skip


def scattered(data: Array, places: Any, updates: Array, function: Any) -> Array:
    result = data.copy()
    function.at(result, places, updates)
    return result


ROWS = np.array([1, 0, 1], np.int32)
UPDATES = normal(3, 3, 4, seed=4)
ALONG = np.array([[[0, 1, 1, 0]], [[1, 0, 0, 0]]], np.int32)
PAIRS = np.array([[0, 2], [1, 1], [0, 2]], np.int32)

INDEX = [
    Case("gather", lambda x, i: mb.gather(x=x, indices=i, axis=-2),
         lambda x, i: np.take(x, i, 1), (X, IDS)),
    Case("gather one", lambda x: mb.gather(x=x, indices=1, axis=1), lambda x: x[:, 1], (X,)),
    Case("gather by batch", lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
         lambda x, i: np.stack([np.take(x[b], i[b], 1) for b in range(2)]), (X, IDS)),
    Case("gather_along_axis", lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
         lambda x, i: np.take_along_axis(x, i, 1), (X, ALONG)),
    Case("gather_nd", lambda x, i: mb.gather_nd(x=x, indices=i),
         lambda x, i: x[i[:, 0], i[:, 1]], (X, PAIRS)),
    Case("gather_nd by batch", lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
         lambda x, i: np.stack([x[b, i[b, :, 0], i[b, :, 1]] for b in range(2)]),
         (X, np.array([[[0, 1], [2, 3]], [[1, 1], [0, 2]]], np.int32))),
    Case("scatter add", lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=0,
         mode="add"), lambda x, i, u: scattered(x, i, u, np.add), (X, ROWS, UPDATES)),
    Case("scatter update", lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=1,
         mode="update"), lambda x, i, u: u[:, [1, 0, 2]],
         (X, np.array([1, 0, 2], np.int32), normal(2, 3, 4, seed=4))),
    Case("scatter max", lambda x, i, u: mb.scatter(data=x, indices=i, updates=u, axis=0,
         mode="max"), lambda x, i, u: scattered(x, i, u, np.maximum), (X, ROWS, UPDATES)),
    Case("scatter_along_axis", lambda x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u,
         axis=1, mode="add"),
         lambda x, i, u: scattered(x, (np.arange(2)[:, None, None], i,
                                       np.arange(4)[None, None, :]), u, np.add),
         (X, ALONG, normal(2, 1, 4, seed=4))),
    Case("scatter_nd", lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode="sub"),
         lambda x, i, u: scattered(x, (i[:, 0], i[:, 1]), u, np.subtract),
         (X, PAIRS, normal(3, 4, seed=4))),
    Case("argsort", lambda x: mb.argsort(x=x, axis=1), lambda x: np.argsort(-x, 1, kind="stable")
         .astype(np.int32), (TIED,)),
    Case("argsort ascending", lambda x: mb.argsort(x=x, axis=0, ascending=True),
         lambda x: np.argsort(x, 0, kind="stable").astype(np.int32), (TIED,)),
    Case("topk values", lambda x: mb.topk(x=x, k=2, axis=1)[0],
         lambda x: -np.sort(-x, 1)[:, :2], (TIED,)),
    Case("topk indices", lambda x: mb.topk(x=x, k=2, axis=1, ascending=True)[1],
         lambda x: np.argsort(x, 1, kind="stable")[:, :2].astype(np.int32), (TIED,)),
    Case("reduce_argmax", lambda x: mb.reduce_argmax(x=x, axis=1, keep_dims=True),
         lambda x: x.argmax(1, keepdims=True).astype(np.int32), (X,)),
    Case("reduce_argmin", lambda x: mb.reduce_argmin(x=x, axis=-1),
         lambda x: x.argmin(-1).astype(np.int32), (X,)),
]  # fmt: skip


def flag(value: Any) -> Any:
    """Core ML gives no truth values out."""
    return mb.cast(x=value, dtype="int32")


INTEGERS = [
    Case("add", lambda x, y: mb.add(x=x, y=y), np.add, (INTS, DIVISORS)),
    Case("sub", lambda x, y: mb.sub(x=x, y=y), np.subtract, (INTS, DIVISORS)),
    Case("mul", lambda x, y: mb.mul(x=x, y=y), np.multiply, (INTS, DIVISORS)),
    Case("floor_div", lambda x, y: mb.floor_div(x=x, y=y), np.floor_divide, (INTS, DIVISORS)),
    Case("mod", lambda x, y: mb.mod(x=x, y=y), np.mod, (INTS, DIVISORS)),
    Case("maximum", lambda x, y: mb.maximum(x=x, y=y), np.maximum, (INTS, DIVISORS)),
    Case("add wraps", lambda x: mb.add(x=x, y=np.int32(2**31 - 1)),
         lambda x: (x.astype(np.int64) + 2**31 - 1).astype(np.int32), (INTS,)),
    Case("reduce_sum", lambda x: mb.reduce_sum(x=x, axes=[1]),
         lambda x: x.sum(1).astype(np.int32), (INTS,)),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1), (INTS,)),
    *[
        Case(name, lambda x, y, name=name: flag(getattr(mb, name)(x=x, y=y)),
             lambda x, y, function=function: function(x, y).astype(np.int32), (INTS, DIVISORS))
        for name, function in (("equal", np.equal), ("not_equal", np.not_equal),
                               ("less", np.less), ("less_equal", np.less_equal),
                               ("greater", np.greater), ("greater_equal", np.greater_equal))
    ],
    *[
        Case(name, lambda x, y, name=name: flag(getattr(mb, name)(
             x=mb.cast(x=x, dtype="bool"), y=mb.greater(x=y, y=0))),
             lambda x, y, function=function: function(x != 0, y > 0).astype(np.int32),
             (INTS, DIVISORS))
        for name, function in (("logical_and", np.logical_and), ("logical_or", np.logical_or),
                               ("logical_xor", np.logical_xor))
    ],
    Case("logical_not", lambda x: flag(mb.logical_not(x=mb.cast(x=x, dtype="bool"))),
         lambda x: (x == 0).astype(np.int32), (INTS,)),
    Case("cast to int", lambda x: mb.cast(x=x, dtype="int32"),
         lambda x: np.array([1, -1, 2, 0], np.int32), (np.float32([1.9, -1.9, 2, -0.5]),)),
    Case("cast to fp16 and back", lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"),
         lambda x: x.astype(np.float16).astype(np.float32),
         (np.array([0.1, 1e-9, 2049, 65519], np.float32),)),
    Case("cast of integers", lambda x: mb.cast(x=x, dtype="fp16"),
         lambda x: x.astype(np.float16), (np.array([1, 2049, -7], np.int32),)),
    Case("cast to uint8", lambda x: mb.cast(x=mb.cast(x=x, dtype="uint8"), dtype="int32"),
         lambda x: x, (np.array([0, 255, 17], np.int32),)),
]  # fmt: skip


def run_cases(folder: Path, cases: Sequence[Case]) -> list[Array]:
    inputs = {
        f"i{at}_{n}": array for at, case in enumerate(cases) for n, array in enumerate(case.inputs)
    }

    def build(*tensors: Any) -> Any:
        named = dict(zip(inputs, tensors, strict=True))
        results: list[Any] = []
        for at, case in enumerate(cases):
            made = case.build(*(named[f"i{at}_{n}"] for n in range(len(case.inputs))))
            results += made if isinstance(made, tuple) else [made]
        return tuple(results)

    return run(folder, build, inputs)


@pytest.mark.parametrize("group", [SHAPES, INDEX, INTEGERS], ids=["shapes", "index", "integers"])
def test_operations_move_what_numpy_moves(group: list[Case], tmp_path: Path) -> None:
    results = run_cases(tmp_path, group)
    assert len(results) == len(group)
    for case, result in zip(group, results, strict=True):
        expected = np.asarray(case.expected(*case.inputs))
        if expected.dtype not in (np.float32, np.float16):
            assert np.issubdtype(result.dtype, np.integer), case.name
        np.testing.assert_allclose(result, expected, rtol=1e-6, err_msg=case.name, strict=False)
        assert result.shape in (expected.shape, expected.shape or (1,)), case.name


@st.composite
def slices(draw: st.DrawFn) -> dict[str, Any]:
    shape = [draw(st.integers(1, 5)) for _ in range(3)]
    begin, end, stride, begin_mask, end_mask = [], [], [], [], []
    for size in shape:
        first = draw(st.integers(0, size - 1))
        last = draw(st.integers(first + 1, size))
        step = draw(st.integers(1, 3))
        backwards = draw(st.booleans())
        negative = draw(st.booleans())
        if backwards:
            first, last, step = last - 1, first - 1, -step
            end_mask.append(last < 0)
        else:
            end_mask.append(draw(st.booleans()))
        begin_mask.append(draw(st.booleans()))
        if end_mask[-1]:
            last = 0
        begin.append(first - size if negative else first)
        end.append(last)
        stride.append(step)
    squeeze = [draw(st.booleans()) and s > 0 for s in stride]
    squeeze[0] = False
    return {
        "shape": shape,
        "begin": begin,
        "end": end,
        "stride": stride,
        "begin_mask": begin_mask,
        "end_mask": end_mask,
        "squeeze_mask": squeeze,
    }


def sliced(x: Array, drawn: dict[str, Any]) -> Array:
    """NumPy's slice."""
    index: list[slice | int] = []
    for axis in range(3):
        first = None if drawn["begin_mask"][axis] else drawn["begin"][axis]
        if drawn["squeeze_mask"][axis]:
            index.append(first or 0)
            continue
        last = None if drawn["end_mask"][axis] else drawn["end"][axis]
        index.append(slice(first, last, drawn["stride"][axis]))
    return np.asarray(x[tuple(index)])


def slicing(drawn: dict[str, Any]) -> Callable[..., Any]:
    """By bounds that are known, and by bounds that are inputs."""
    masks = {n: value for n, value in drawn.items() if n not in ("shape", "begin", "end")}

    def build(x: Any, begin: Any, end: Any) -> Any:
        fixed = mb.slice_by_index(x=x, begin=drawn["begin"], end=drawn["end"], **masks)
        return mb.identity(x=fixed), mb.slice_by_index(x=x, begin=begin, end=end, **masks)

    return build


# A program costs a second, whatever it holds: each holds 16 slices.
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(slices(), min_size=16, max_size=16))
def test_slice_by_index_slices_as_numpy(tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    cases = []
    for one in drawn:
        x, *bounds = normal(*one["shape"]), *(np.array(one[n], np.int32) for n in ("begin", "end"))
        if sliced(x, one).size:
            inputs = (x, *bounds)
            cases.append(
                Case(str(one), slicing(one), lambda x, *_, one=one: sliced(x, one), inputs)
            )
    fixed_and_given = iter(run_cases(tmp_path, cases))
    for case in cases:
        for _ in range(2):
            expected = case.expected(*case.inputs)
            np.testing.assert_array_equal(next(fixed_and_given), expected, err_msg=case.name)
    assert not list(fixed_and_given)


def test_slice_by_size_and_update(tmp_path: Path) -> None:
    x, update = normal(4, 5), normal(2, 2, seed=1)
    start = np.array([1, 2], np.int32)

    def build(x: Any, update: Any, start: Any) -> Any:
        return (
            mb.slice_by_size(x=x, begin=start, size=[2, -1]),
            mb.slice_by_size(x=x, begin=[0, 1], size=[3, 2]),
            mb.slice_update(x=x, update=update, begin=start, end=mb.add(x=start, y=2)),
            mb.slice_update(x=x, update=update, begin=[0, 0], end=[4, 4], stride=[2, 2]),
        )

    results = run(tmp_path, build, {"x": x, "update": update, "start": start})
    updated, strided = x.copy(), x.copy()
    updated[1:3, 2:4] = update
    strided[0:4:2, 0:4:2] = update
    for result, expected in zip(results, (x[1:3, 2:], x[0:3, 1:3], updated, strided), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_an_index_out_of_bounds_is_an_error_that_names_the_operation(tmp_path: Path) -> None:
    def build(x: Any, i: Any) -> Any:
        return mb.gather(x=x, indices=i, axis=0, name="picked")

    x = normal(4, 2)
    good = np.array([3, 0], np.int32)
    for target, allowed in ((ct.target.iOS18, False), (ct.target.iOS16, True)):
        model = open_model(save(tmp_path, build, {"x": x, "i": good}, target=target), "main")
        np.testing.assert_array_equal(
            next(iter(model.predict({"x": x, "i": good}).values())), x[good]
        )
        with pytest.raises(ExportError, match=r"gather 'picked' cannot be computed.*into 4"):
            model.predict({"x": x, "i": np.array([4, 0], np.int32)})
        # Indices from the end are gone since iOS 17.
        last = {"x": x, "i": np.array([-1, 0], np.int32)}
        if allowed:
            np.testing.assert_array_equal(next(iter(model.predict(last).values())), x[[-1, 0]])
        else:
            with pytest.raises(ExportError, match="index of -1"):
                model.predict(last)


def test_an_update_beyond_a_tensor_is_an_error(tmp_path: Path) -> None:
    def build(x: Any, update: Any, start: Any) -> Any:
        return mb.slice_update(x=x, update=update, begin=start, end=mb.add(x=start, y=2))

    inputs = {"x": normal(4), "update": normal(2), "start": np.array([3], np.int32)}
    with pytest.raises(ExportError, match=r"slice_update .*update of \[2\] for a slice \[1\]"):
        run(tmp_path, build, inputs)
