"""The build plan: its profiles, and its file, which somebody else may have written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets.tensorrt_plan import (
    DECODE,
    PLAN,
    PREFILL,
    Range,
    parse_tensor,
    profiles,
    read_plan,
)

from . import tensorrt_bundles as toys


def test_the_same_plan_comes_back_and_is_the_same_bytes(tmp_path: Path) -> None:
    plan = toys.folder(tmp_path)
    assert read_plan(tmp_path) == plan
    assert read_plan(tmp_path).to_json() == (tmp_path / PLAN).read_text()


def test_prefill_reaches_to_the_context_and_decode_takes_one_token() -> None:
    inputs = {
        "inputs_embeds": "float32[1,sequence_length,64]",
        "attention_mask": "int64[1,attended_length]",
        "past_key_values.0.key": "float16[1,2,1024,32]",
    }
    prefill, decode = profiles(inputs, context=1024, image_tokens=256)
    assert (prefill.name, decode.name) == (PREFILL, DECODE)
    assert prefill.shapes == {
        "inputs_embeds": Range(min=(1, 1, 64), opt=(1, 288, 64), max=(1, 1024, 64)),
        "attention_mask": Range(min=(1, 1), opt=(1, 288), max=(1, 1024)),
    }
    assert decode.shapes["inputs_embeds"] == Range(min=(1, 1, 64), opt=(1, 1, 64), max=(1, 1, 64))
    assert decode.shapes["attention_mask"] == Range(min=(1, 1), opt=(1, 768), max=(1, 1024))


def test_nothing_is_tuned_for_more_than_a_short_context() -> None:
    for profile in profiles({"attention_mask": "int64[1,attended_length]"}, 40, 256):
        assert profile.shapes["attention_mask"] == Range(min=(1, 1), opt=(1, 40), max=(1, 40))


def test_a_graph_of_one_shape_has_one_profile_without_shapes() -> None:
    (static,) = profiles({"pixel_values": "float32[1,3,64,64]"}, 100, 4)
    assert (static.name, static.shapes) == ("static", {})


def test_a_size_that_no_profile_knows_is_a_bug() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        profiles({"pixel_values": "float32[batch_size,3,64,64]"}, 100, 4)


def test_tensors_are_read_from_their_text() -> None:
    assert parse_tensor("int64[]") == ("int64", ())
    assert parse_tensor("float16[1,sequence_length]") == ("float16", (1, "sequence_length"))
    with pytest.raises(ValueError, match="no tensor"):
        parse_tensor("float16(1)")


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (_set("schema", to=99), "schema 99"),
        (_set("surprise", to=1), "surprise"),
        (_set("backend", to="cuda"), "cuda"),
        (_set("float_type", to="float64"), "float64"),
        (_set("context", to=0), "0 is no size"),
        (_set("context", to=True), "True is no size"),
        (_set("compute_capabilities", to="80"), "compute_capabilities"),
        (_set("compute_capabilities", to=["../80"]), "compute_capabilities"),
        (_set("graphs", to=[]), "graphs"),
        (_set("graphs", "vision", to=None), "vision"),
        (_set("graphs", "vision", "onnx", to="/etc/passwd"), "/etc/passwd"),
        (_set("graphs", "vision", "engine", to="../../engine"), "../../engine"),
        (_set("graphs", "vision", "inputs", to=[1]), "damaged"),
        (_set("graphs", "vision", "inputs", "pixel_values", to="everything"), "no tensor"),
        (_set("graphs", "vision", "inputs", "pixel_values", to=5), "damaged"),
        (_set("graphs", "vision", "float32_nodes", to={"a": 1}), "float32_nodes"),
        (_set("graphs", "decoder", "profiles", to={}), "profiles"),
        (_set("graphs", "decoder", "profiles", 0, "name", to="fast"), "fast"),
        (
            _set("graphs", "decoder", "profiles", 0, "shapes", "attention_mask", "max", to=[1, -1]),
            "-1 is no size",
        ),
        (
            _set("graphs", "decoder", "profiles", 0, "shapes", "attention_mask", "min", to=[2, 1]),
            "attention_mask",
        ),
        (
            _set("graphs", "decoder", "profiles", 0, "shapes", "attention_mask", "opt", to=[1]),
            "attention_mask",
        ),
        (_set("graphs", "decoder", "profiles", 0, "shapes", "stranger", to={}), "stranger"),
    ],
)
def test_a_hostile_plan_is_one_error(
    change: Callable[[Any], None], word: str, tmp_path: Path
) -> None:
    toys.folder(tmp_path)
    values = json.loads((tmp_path / PLAN).read_text())
    change(values)
    (tmp_path / PLAN).write_text(json.dumps(values))
    with pytest.raises(ExportError) as caught:
        read_plan(tmp_path)
    assert "damaged" in caught.value.message
    assert word in caught.value.message
    assert "fastvlm-export" in caught.value.hint


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_plan_is_one_error(text: bytes, tmp_path: Path) -> None:
    (tmp_path / PLAN).write_bytes(text)
    with pytest.raises(ExportError, match=PLAN):
        read_plan(tmp_path)


def test_a_missing_plan_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"has no {PLAN}"):
        read_plan(tmp_path)
