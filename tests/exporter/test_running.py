"""What `bench` and `generate` do before and around the measuring: no artifact is needed for it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from fastvlm_export.exporter import checkpoint, running
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.running import BenchRequest, Question
from fastvlm_export.validate import placement
from fastvlm_export.validate.placement import Placement
from fastvlm_export.validate.sessions import Runtime

MAC = Runtime(name="Core ML", device=True)
INTERPRETER = Runtime(name="MIL reference interpreter", device=False)


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Let `bench` find a bundle of a target, run somewhere; gives what it then times."""
    timed = []

    def find(target, where):
        bundle = SimpleNamespace(path=tmp_path, manifest=SimpleNamespace(target=target))

        def time_bundle(bundle, sample, plan, say, peer, compute_units):
            timed.append(compute_units)
            return SimpleNamespace(to_dict=lambda: {"subjects": []})

        monkeypatch.setattr(running, "open_bundle", lambda path, progress: bundle)
        monkeypatch.setattr(running, "reading", nullcontext)
        monkeypatch.setattr(running, "runtime", lambda bundle: where)
        monkeypatch.setattr(running, "time_bundle", time_bundle)
        return timed

    monkeypatch.setattr(
        placement, "measure", lambda bundle, units: Placement(compute_units=units, functions=())
    )
    return find


def request(path, *units):
    return BenchRequest(bundle=path, compute_units=units)


@pytest.mark.parametrize(
    ("asked", "units"),
    [
        ((), ("all",)),
        (("cpu-and-ne",), ("cpu-and-ne",)),
        (("cpu-only", "all", "cpu-only"), ("cpu-only", "all")),
    ],
)
def test_a_core_ml_bundle_is_timed_and_placed_on_each_choice_once(opened, tmp_path, asked, units):
    timed = opened("coreml", MAC)
    found = running.bench(request(tmp_path, *asked))
    assert timed == [units]
    assert tuple(one.compute_units for one in found.placements) == units
    document = json.loads(json.dumps(found.to_dict()))
    assert [one["compute_units"] for one in document["placement"]] == list(units)
    assert document["subjects"] == []


def test_another_target_is_timed_without_units_or_placement(opened, tmp_path):
    timed = opened("onnx", Runtime(name="ONNX Runtime", device=True))
    assert running.bench(request(tmp_path)).placements == ()
    assert timed == [()]


def test_units_for_another_target_are_refused(opened, tmp_path):
    timed = opened("onnx", Runtime(name="ONNX Runtime", device=True))
    with pytest.raises(ExportError, match="Core ML's; this is a bundle of target 'onnx'"):
        running.bench(request(tmp_path, "cpu-only"))
    assert timed == []


def test_units_that_there_are_not_are_named(opened, tmp_path):
    opened("coreml", MAC)
    with pytest.raises(ExportError, match="npu, tpu: there are no such units") as caught:
        running.bench(request(tmp_path, "npu", "all", "tpu"))
    assert "cpu-and-ne" in caught.value.hint


def test_nothing_is_timed_in_an_interpreter(opened, tmp_path):
    timed = opened("coreml", INTERPRETER)
    with pytest.raises(ExportError, match="says nothing about a device") as caught:
        running.bench(request(tmp_path, "cpu-and-ne"))
    assert "macOS" in caught.value.message
    assert caught.value.hint.endswith(f"bench {tmp_path} --compute-units cpu-and-ne")
    assert timed == []


def test_a_plan_that_cannot_be_had_does_not_cost_the_timing(opened, tmp_path, monkeypatch):
    def refuse(bundle, units):
        raise ExportError("no plan", "do")

    timed = opened("coreml", MAC)
    monkeypatch.setattr(placement, "measure", refuse)
    found = running.bench(request(tmp_path))
    assert timed == [("all",)]
    assert found.placements == (Placement(compute_units="all", functions=(), problem="no plan"),)


@pytest.mark.parametrize(("where", "said"), [(INTERPRETER, True), (MAC, False)])
def test_generate_says_when_no_device_answers(monkeypatch, tmp_path, where, said):
    model = checkpoint.bundled()
    token = model.tokenizer.encode("red")[0]

    class Session:
        def reset(self):
            pass

        def embed(self, ids):
            return np.zeros((*ids.shape, 4), np.float32)

        def decode(self, embeds):
            return np.eye(model.config.decoder.vocab_size, dtype=np.float32)[[token]]

    manifest = SimpleNamespace(
        target="coreml",
        image_token_id=model.image_token_id,
        image_tokens=4,
        context=64,
        eos_token_ids=(),
    )
    bundle = SimpleNamespace(path=tmp_path, manifest=manifest)
    stderr = Console(record=True, width=120, quiet=False)
    monkeypatch.setattr(running, "open_bundle", lambda path: bundle)
    monkeypatch.setattr(running, "reading", nullcontext)
    monkeypatch.setattr(running, "read_tokenizer", lambda path: model.tokenizer)
    monkeypatch.setattr(running, "runtime", lambda bundle: where)
    monkeypatch.setattr(running, "open_session", lambda bundle: Session())
    monkeypatch.setattr(running, "messages", stderr)
    answer = running.ask(Question(bundle=tmp_path, prompt="Which colour?", max_new_tokens=2))
    assert answer.token_ids == [token] * 2
    assert ("MIL reference interpreter" in stderr.export_text()) == said
