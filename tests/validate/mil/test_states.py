"""States: what is written stays, in place where nobody sees it, copied where somebody does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.validate.mil import open_model

from .programs import Array, mb, normal, save

SHAPE = (3, 1, 8, 4)
STATES = {"cache": SHAPE}


def half(*shape: int, seed: int = 0) -> Array:
    return normal(*shape, seed=seed).astype(np.float16)


def append(cache: Any, rows: Any, layer: int, position: Any) -> Any:
    """Write `rows` [1,1,n,4] at a position of a layer."""
    begin = mb.concat(values=(np.array([layer, 0], np.int32), position, np.int32([0])), axis=0)
    last = mb.add(x=position, y=np.int32(rows.shape[2]))
    end = mb.concat(values=(np.array([layer + 1, 1], np.int32), last, np.int32([4])), axis=0)
    return mb.slice_update(x=cache, update=rows, begin=begin, end=end)


def test_a_cache_keeps_its_rows_between_runs_and_is_written_in_place(tmp_path: Path) -> None:
    def build(rows: Any, position: Any, cache: Any) -> Any:
        outputs = []
        for layer in range(3):
            updated = append(mb.read_state(input=cache), rows, layer, position)
            stored = mb.coreml_update_state(state=cache, value=updated)
            own = mb.slice_by_index(x=stored, begin=[layer, 0, 0, 0], end=[layer + 1, 1, 8, 4])
            outputs.append(mb.mul(x=own, y=np.float16(1)))
            rows = mb.mul(x=rows, y=np.float16(2))
        return mb.concat(values=tuple(outputs), axis=0)

    inputs = {"rows": half(1, 1, 2, 4), "position": np.array([0], np.int32)}
    model = open_model(save(tmp_path, build, inputs, states=STATES), "main")
    state = model.make_state()
    memory = state["cache"].data_ptr()
    expected = np.zeros(SHAPE, np.float16)
    for step in range(4):
        rows = half(1, 1, 2, 4, seed=step)
        (result,) = model.predict(
            {"rows": rows, "position": np.array([2 * step], np.int32)}, state
        ).values()
        for layer in range(3):
            expected[layer, :, 2 * step : 2 * step + 2] = rows[0] * 2**layer
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(state["cache"].numpy(), expected)
    assert state["cache"].data_ptr() == memory
    assert copies(model) == 0
    with pytest.raises(ExportError, match="cannot be computed: an update of"):
        model.predict({"rows": rows, "position": np.array([7], np.int32)}, state)


def copies(model: Any) -> int:
    """How many whole caches a run copies."""
    calls = 0
    clone, copy = torch.Tensor.clone, torch.Tensor.copy_

    def count(function: Any) -> Any:
        def counted(tensor: Any, *rest: Any) -> Any:
            nonlocal calls
            calls += tuple(tensor.shape) == SHAPE
            return function(tensor, *rest)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", count(clone))
        patch.setattr(torch.Tensor, "copy_", count(copy))
        model.predict(
            {"rows": half(1, 1, 2, 4), "position": np.array([0], np.int32)}, model.make_state()
        )
    return calls


def test_what_was_read_before_a_write_stays_as_it_was(tmp_path: Path) -> None:
    def build(rows: Any, position: Any, cache: Any) -> Any:
        before = mb.read_state(input=cache)
        row = mb.slice_by_index(x=before, begin=[1, 0, 0, 0], end=[2, 1, 2, 4])
        updated = append(before, rows, 1, position)
        after = mb.coreml_update_state(state=cache, value=updated)
        again = append(after, mb.mul(x=rows, y=np.float16(3)), 1, position)
        last = mb.coreml_update_state(state=cache, value=again)
        # Everything is still wanted at the end.
        return tuple(mb.add(x=x, y=np.float16(0)) for x in (before, row, updated, after, last))

    inputs = {"rows": half(1, 1, 2, 4), "position": np.array([0], np.int32)}
    model = open_model(save(tmp_path, build, inputs, states=STATES), "main")
    state = model.make_state()
    old = half(*SHAPE, seed=7)
    state["cache"].copy_(torch.from_numpy(old))
    before, row, updated, after, last = model.predict(inputs, state).values()
    once, thrice = old.copy(), old.copy()
    once[1, :, :2], thrice[1, :, :2] = inputs["rows"][0], inputs["rows"][0] * 3
    np.testing.assert_array_equal(before, old)
    np.testing.assert_array_equal(row, old[1:2, :, :2])
    np.testing.assert_array_equal(updated, once)
    np.testing.assert_array_equal(after, once)
    np.testing.assert_array_equal(last, thrice)
    np.testing.assert_array_equal(state["cache"].numpy(), thrice)


def test_a_chain_of_updates_written_once_is_in_place(tmp_path: Path) -> None:
    def build(rows: Any, position: Any, cache: Any) -> Any:
        value = mb.read_state(input=cache)
        for layer in range(3):
            value = append(value, rows, layer, position)
        return mb.identity(x=mb.coreml_update_state(state=cache, value=value))

    inputs = {"rows": half(1, 1, 2, 4), "position": np.array([3], np.int32)}
    model = open_model(save(tmp_path, build, inputs, states=STATES), "main")
    (result,) = model.predict(inputs, model.make_state()).values()
    expected = np.zeros(SHAPE, np.float16)
    expected[:, :, 3:5] = inputs["rows"][0]
    np.testing.assert_array_equal(result, expected)
    assert copies(model) == 0


def test_a_value_that_uses_the_state_itself_is_copied(tmp_path: Path) -> None:
    """A window that moves: the new state is a part of the old one."""

    def build(rows: Any, cache: Any) -> Any:
        old = mb.read_state(input=cache)
        kept = mb.slice_by_index(x=old, begin=[0, 0, 2, 0], end=[3, 1, 8, 4])
        moved = mb.coreml_update_state(state=cache, value=mb.concat(values=(kept, rows), axis=2))
        flipped = mb.transpose(x=mb.reshape(x=moved, shape=[3, 1, 4, 8]), perm=[0, 1, 3, 2])
        return mb.identity(x=mb.coreml_update_state(state=cache, value=flipped))

    inputs = {"rows": half(3, 1, 2, 4)}
    model = open_model(save(tmp_path, build, inputs, states=STATES), "main")
    state = model.make_state()
    old = half(*SHAPE, seed=5)
    state["cache"].copy_(torch.from_numpy(old))
    (result,) = model.predict(inputs, state).values()
    moved = np.concatenate([old[:, :, 2:], inputs["rows"]], 2)
    expected = moved.reshape(3, 1, 4, 8).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(state["cache"].numpy(), expected)


def test_updates_of_what_is_no_state_leave_constants_and_inputs_alone(tmp_path: Path) -> None:
    weights = half(4, 3, seed=3)

    def build(x: Any) -> Any:
        table = mb.const(val=weights)
        first = mb.slice_update(x=table, update=x, begin=[0, 0], end=[1, 3])
        grown = mb.add(x=first, y=np.float16(1))
        view = mb.reshape(x=grown, shape=[3, 4])
        second = mb.slice_update(x=grown, update=x, begin=[2, 0], end=[3, 3])
        return first, second, mb.add(x=view, y=np.float16(0)), mb.slice_update(
            x=x, update=np.zeros((1, 1), np.float16), begin=[0, 0], end=[1, 1]
        )  # fmt: skip

    x = half(1, 3)
    model = open_model(save(tmp_path, build, {"x": x}), "main")
    for _ in range(2):
        first, second, view, own = model.predict({"x": x}).values()
        expected = weights.copy()
        expected[:1] = x
        np.testing.assert_array_equal(first, expected)
        grown = expected + np.float16(1)
        np.testing.assert_array_equal(view, grown.reshape(3, 4))
        grown[2:3] = x
        np.testing.assert_array_equal(second, grown)
        assert own[0, 0] == 0 and x[0, 0] != 0


def test_a_missing_or_foreign_state_is_an_error(tmp_path: Path) -> None:
    def build(x: Any, cache: Any) -> Any:
        return mb.add(x=x, y=mb.read_state(input=cache))

    x = half(*SHAPE)
    model = open_model(save(tmp_path, build, {"x": x}, states=STATES), "main")
    for state in (None, {}, {"cache": torch.zeros(2)}):
        with pytest.raises(ExportError, match=r"needs the states .*cache"):
            model.predict({"x": x}, state)
