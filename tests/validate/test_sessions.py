"""Which runtime opens a bundle here: its own, or the interpreter, and when neither can."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvlm_export import targets
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import (
    apple_app,
    coreml_session,
    executorch_backends,
    onnx,
    tensorrt_onnx_session,
)
from fastvlm_export.targets.base import Availability
from fastvlm_export.targets.tensorrt_device import Gpu
from fastvlm_export.validate import mil, sessions
from fastvlm_export.validate.sessions import GRAPHS, INTERPRETER, Runtime


class Machine:
    """Targets as one machine has them; sessions are what they were opened with."""

    def __init__(self, patch: pytest.MonkeyPatch, **found: Availability) -> None:
        self.found = found
        patch.setattr(targets, "get", self.get)
        patch.setattr(coreml_session, "CoreMLSession", lambda bundle, opener: ("packages", opener))
        patch.setattr(
            apple_app, "AppleAppSession", lambda bundle, opener, exact=False: ("app", opener, exact)
        )
        patch.setattr(mil, "open_model", lambda *, exact=False: ("interpreter", exact))
        patch.setattr(coreml_session, "open_mlmodel", lambda units: lambda: ("Core ML", units))

    def get(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            availability=lambda: self.found[name], open=lambda bundle: f"{name}'s own"
        )


def has(*, lower: bool, run: bool) -> Availability:
    return Availability(lower=lower, run=run, versions={}, remedy="install it")


def bundle(
    target: str = "coreml", recipe: str = "int8", artifact: Mapping[str, str | int] | None = None
) -> SimpleNamespace:
    manifest = SimpleNamespace(
        target=target, recipe=RECIPES[recipe].to_dict(), artifact=artifact or {}
    )
    return SimpleNamespace(manifest=manifest, path=Path("bundle"))


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, onnx=has(lower=True, run=True), coreml=has(lower=True, run=False))


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, onnx=has(lower=True, run=True), coreml=has(lower=True, run=True))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, onnx=has(lower=True, run=False), coreml=has(lower=False, run=False))


def test_off_a_mac_the_interpreter_stands_in_and_is_no_device(linux: Machine) -> None:
    assert sessions.runtime(bundle()) == INTERPRETER
    assert not INTERPRETER.device
    assert sessions.can_run("coreml")
    kind, opener = sessions.open_session(bundle())
    assert (kind, opener()) == ("packages", ("interpreter", False))
    _, opener = sessions.open_session(bundle(), exact=True)
    assert opener() == ("interpreter", True)


def test_on_a_mac_core_ml_runs_but_for_the_exact_comparison(mac: Machine) -> None:
    assert sessions.runtime(bundle()) == Runtime(name="Core ML", device=True)
    assert sessions.open_session(bundle()) == "coreml's own"
    _, opener = sessions.open_session(bundle(), exact=True)
    assert opener() == ("interpreter", True)
    _, opener = sessions.open_session(bundle(), compute_units="cpu-only")
    assert opener() == ("Core ML", "cpu-only")


def test_the_layout_in_the_manifest_chooses_the_session(mac: Machine) -> None:
    app = bundle(artifact={"layout": apple_app.LAYOUT})
    kind, opener, exact = sessions.open_session(app, exact=True)
    assert (kind, opener(), exact) == ("app", ("interpreter", True), True)
    kind, opener, _ = sessions.open_session(app, compute_units="all")
    assert (kind, opener()) == ("app", ("Core ML", "all"))
    assert sessions.open_session(bundle(artifact={"layout": "fastvlm"}), exact=True)[0] == (
        "packages"
    )


def test_other_targets_run_in_their_own_runtime(linux: Machine) -> None:
    found = bundle("onnx")
    assert sessions.runtime(found) == Runtime(name="ONNX Runtime", device=True)
    assert sessions.open_session(found) == "onnx's own"


def test_onnx_runtime_also_computes_its_graphs_without_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx, "open", lambda bundle, exact: ("graphs", exact))
    Machine(monkeypatch, onnx=has(lower=True, run=True))
    assert sessions.open_session(bundle("onnx"), exact=True) == ("graphs", True)
    Machine(monkeypatch, onnx=has(lower=True, run=False))
    assert not sessions.has_exact(bundle("onnx"))
    with pytest.raises(ExportError, match="'onnx' can't be run here"):
        sessions.open_session(bundle("onnx"), exact=True)


def test_where_nothing_runs_a_bundle_the_remedy_is_said(bare: Machine) -> None:
    for target in ("onnx", "coreml"):
        assert not sessions.can_run(target)
        with pytest.raises(ExportError, match=f"'{target}' can't be run here") as caught:
            sessions.open_session(bundle(target))
        assert caught.value.hint == "install it"


@pytest.mark.parametrize(
    ("asked", "options", "said"),
    [
        (bundle("onnx"), {"compute_units": "all"}, "the ONNX Runtime has none"),
        (bundle(), {"compute_units": "all"}, "the MIL reference interpreter has none"),
    ],
)
def test_what_a_runtime_does_not_have_is_refused(
    linux: Machine, asked: SimpleNamespace, options: dict[str, object], said: str
) -> None:
    with pytest.raises(ExportError, match=said):
        sessions.open_session(asked, **options)


@pytest.mark.parametrize(
    ("target", "recipe"),
    [
        ("coreml", "fp32"),
        ("coreml", "fp16"),
        ("coreml", "int4"),
        ("coreml", "lut4"),
        ("tensorrt", "fp32"),
        ("tensorrt", "fp16"),
        ("tensorrt", "int8"),
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("onnx", "int8"),
        ("onnx", "int4"),
    ],
)
def test_bundles_of_every_recipe_have_an_exact_form_where_something_computes_it(
    linux: Machine, target: str, recipe: str
) -> None:
    assert sessions.has_exact(bundle(target, recipe))


@pytest.fixture
def executorch(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(executorch_backends, "find_spec", lambda name: name)
    return Machine(monkeypatch, executorch=has(lower=True, run=True))


def test_executorchs_runtime_is_a_device_here_but_for_what_it_hands_to_core_ml(
    executorch: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = SimpleNamespace(ExactExecuTorchSession=lambda bundle: "the program")
    monkeypatch.setitem(sys.modules, "fastvlm_export.validate.executorch_exact", exact)
    for backend in ("xnnpack", "portable"):
        found = bundle("executorch", artifact={"backend": backend})
        assert sessions.runtime(found) == Runtime(name="ExecuTorch", device=True)
        assert sessions.open_session(found) == "executorch's own"
        assert sessions.not_timed(found) == ""
        assert sessions.has_exact(found)
        assert sessions.has_exact(bundle("executorch", "fp32", found.manifest.artifact))
        assert sessions.open_session(found, exact=True) == "the program"
    found = bundle("executorch", artifact={"backend": "coreml"})
    opened = SimpleNamespace(CoreMLDelegateSession=lambda bundle, exact: ("delegates", exact))
    monkeypatch.setitem(sys.modules, "fastvlm_export.validate.executorch_coreml", opened)
    assert sessions.runtime(found) == INTERPRETER
    assert sessions.open_session(found) == ("delegates", False)
    assert sessions.open_session(found, exact=True) == ("delegates", True)
    assert sessions.has_exact(found)
    assert "delegates" in sessions.not_timed(found)


def test_core_mls_delegates_need_the_interpreters_package(
    executorch: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executorch_backends, "find_spec", lambda name: None)
    assert sessions.runs_here("executorch") is not None
    assert sessions.runs_here("executorch", "coreml") is None
    with pytest.raises(ExportError, match="can't be run here") as error:
        sessions.runtime(bundle("executorch", artifact={"backend": "coreml"}))
    assert "pip install" in error.value.hint


def test_engines_run_on_a_gpu_and_elsewhere_onnx_runtime_runs_their_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = bundle("tensorrt", artifact={"backend": "tensorrt-rtx", "engines": 1})
    unbuilt = bundle("tensorrt", artifact={"backend": "tensorrt", "engines": 0})
    monkeypatch.setattr(
        tensorrt_onnx_session, "TensorRTOnnxSession", lambda bundle, exact: ("graphs", exact)
    )
    for gpu in (False, True):
        Machine(monkeypatch, onnx=has(lower=True, run=True), tensorrt=has(lower=True, run=gpu))
        assert sessions.runtime(unbuilt) == GRAPHS
        assert sessions.open_session(unbuilt) == ("graphs", False)
        for one in (built, unbuilt):
            assert sessions.open_session(one, exact=True) == ("graphs", True)
        assert "fastvlm-export build BUNDLE, then fastvlm-export bench" in sessions.not_timed(
            unbuilt
        )
        if gpu:
            assert sessions.runtime(built) == Runtime(name="TensorRT", device=True)
            assert sessions.open_session(built) == "tensorrt's own"
            assert sessions.not_timed(built) == ""
        else:
            assert sessions.runtime(built) == GRAPHS
            assert sessions.open_session(built) == ("graphs", False)
            assert "no engine ran" in sessions.not_timed(built)
            assert "build" not in sessions.not_timed(built)
    assert not GRAPHS.device


@pytest.mark.parametrize(
    ("capability", "how"), [("86", "--compute-capability 86"), ("90", "--backend tensorrt")]
)
def test_engines_for_other_gpus_are_proven_by_their_graphs_and_how_to_build_others_is_said(
    monkeypatch: pytest.MonkeyPatch, capability: str, how: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    Machine(monkeypatch, onnx=has(lower=True, run=True), tensorrt=has(lower=True, run=True))
    gpu = Gpu(name="Toy", capability=capability, driver=13000, memory_bytes=2**33)
    monkeypatch.setattr(sessions, "find_gpu", lambda: gpu)
    facts = {"backend": "tensorrt-rtx", "engines": 1}
    foreign = bundle("tensorrt", artifact={**facts, "compute_capabilities": "80,120"})
    own = bundle("tensorrt", artifact={**facts, "compute_capabilities": f"80,{capability}"})
    assert sessions.runtime(foreign) == GRAPHS
    said = sessions.not_timed(foreign)
    assert f"for compute capability 80, 120, and Toy has {capability}" in said
    assert f"fastvlm-export build BUNDLE {how}, then" in said
    assert sessions.runtime(own).device
    assert sessions.not_timed(own) == ""


def test_without_a_gpu_and_onnx_runtime_a_tensorrt_bundle_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = has(lower=False, run=False)
    Machine(monkeypatch, onnx=bare, tensorrt=bare)
    assert not sessions.can_run("tensorrt")
    built = bundle("tensorrt", artifact={"backend": "tensorrt-rtx", "engines": 1})
    with pytest.raises(ExportError, match="'tensorrt' can't be run here") as caught:
        sessions.open_session(built)
    assert caught.value.hint == "install it"
    with pytest.raises(ExportError, match="has no engines yet") as caught:
        sessions.open_session(bundle("tensorrt", artifact={"engines": 0}))
    assert "fastvlm-export build BUNDLE" in caught.value.hint
    assert not sessions.has_exact(built)
    Machine(monkeypatch, onnx=has(lower=True, run=True), tensorrt=bare)
    with pytest.raises(ExportError, match="the ONNX Runtime, on the ONNX graphs of the engines"):
        sessions.open_session(built, compute_units="all")
