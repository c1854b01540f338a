"""Core ML's own part of a session, by stand-ins for coremltools' Mac-only classes.

They have those classes' signatures, which a test checks; what they compute comes from the reference
interpreter.
"""

import inspect
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import coreml_session
from fastvlm_export.targets.coreml_model import (
    DECODE,
    DECODER,
    EMBEDDING,
    EMBEDS,
    IDS,
    LENGTH,
    MAIN,
    POSITION,
    PREFILL,
    VISION,
)
from fastvlm_export.targets.coreml_session import COMPUTE_UNITS, CoreMLSession, open_mlmodel
from fastvlm_export.validate.mil import open_model

from . import coreml_packages as toy
from . import coreml_stand_ins as stand_ins
from .coreml_stand_ins import StandInModel

with quiet_import():
    import coremltools
    from coremltools.models import utils
    from coremltools.models.compute_plan import MLComputePlan


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return toy.write_bundle(tmp_path_factory.mktemp("coreml") / "bundle")


@pytest.fixture
def mac(monkeypatch, tmp_path):
    """A Mac, as far as `open_mlmodel` can tell; gives the list of compilations."""
    compiled = []

    def compile_model(model, destination_path=None):
        compiled.append(Path(model).name)
        return stand_ins.compile_model(model, destination_path)

    stand_ins.install(monkeypatch.setattr)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(utils, "compile_model", compile_model)
    monkeypatch.setattr(StandInModel, "opened", [])
    return compiled


def parameters(function):
    return [
        (one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(
    ("real", "stand_in"),
    [
        *(
            (getattr(coremltools.models.CompiledMLModel, name), getattr(StandInModel, name))
            for name in ("__init__", "predict", "make_state")
        ),
        (utils.compile_model, stand_ins.compile_model),
        (MLComputePlan.load_from_path, stand_ins.load_from_path),
    ],
    ids=lambda function: function.__qualname__,
)
def test_the_stand_ins_have_the_signatures_of_the_real_thing(real, stand_in):
    assert parameters(stand_in) == parameters(real)


def test_a_session_in_core_ml_answers_as_in_the_interpreter(bundle, mac):
    ours, theirs = CoreMLSession(bundle, open_mlmodel("all")), CoreMLSession(bundle, open_model)
    for session in (ours, theirs):
        session.decode(session.embed(np.array([[1, 2, 3, 4, 0, 2]])))
    step = np.full((1, 1, toy.D), 0.5, np.float32)
    np.testing.assert_array_equal(ours.decode(step), theirs.decode(step))
    pixels = np.ones((1, 3, toy.R, toy.R), np.float32)
    np.testing.assert_array_equal(ours.encode_image(pixels), theirs.encode_image(pixels))
    assert [one.inputs for one in (ours.prefill, ours.decode_one, ours.embedding)] == [
        {EMBEDS: (1, toy.CHUNK, toy.D), POSITION: (1,), LENGTH: (1,)},
        {EMBEDS: (1, 1, toy.D), POSITION: (1,)},
        {IDS: (1, -1)},
    ]


@pytest.mark.parametrize("units", COMPUTE_UNITS)
def test_units_and_functions_are_handed_to_core_ml(bundle, mac, units):
    CoreMLSession(bundle, open_mlmodel(units))
    unit = coremltools.ComputeUnit[units.upper().replace("-", "_")].name
    assert sorted(StandInModel.opened, key=str) == sorted(
        [
            (VISION, None, unit),  # a package with one function knows it by no name
            (EMBEDDING, None, unit),
            (DECODER, PREFILL, unit),
            (DECODER, DECODE, unit),
        ],
        key=str,
    )


def test_every_unit_of_core_ml_has_a_name_here():
    names = {one.name.lower().replace("_", "-") for one in coremltools.ComputeUnit}
    assert set(COMPUTE_UNITS) == names


def test_a_package_is_compiled_once_for_all_its_functions_and_sessions(bundle, mac):
    for _ in range(2):
        CoreMLSession(bundle, open_mlmodel("all"))
    assert sorted(mac) == sorted([VISION, EMBEDDING, DECODER])


def test_a_cold_start_on_some_units_leaves_the_others_warm(bundle, mac):
    for units in ("all", "cpu-only"):
        open_mlmodel(units)(bundle.path / VISION, MAIN)
    coreml_session.forget_compiled(bundle.path / VISION, "all")
    assert len(mac) == 2
    open_mlmodel("cpu-only")(bundle.path / VISION, MAIN)
    assert len(mac) == 2
    open_mlmodel("all")(bundle.path / VISION, MAIN)
    assert len(mac) == 3


def test_a_forgotten_or_changed_package_is_compiled_anew(bundle, mac, tmp_path):
    package = tmp_path / VISION
    shutil.copytree(bundle.path / VISION, package)
    open_mlmodel()(package, MAIN)
    coreml_session.forget_compiled(package, "all")
    open_mlmodel()(package, MAIN)
    assert mac == [VISION] * 2
    specification = next(package.rglob("*.mlmodel"))
    specification.write_bytes(specification.read_bytes())
    first = next(coreml_session.compiled_folder(package, "all").iterdir())
    open_mlmodel()(package, MAIN)
    assert mac == [VISION] * 3
    assert not first.exists()  # nobody can ask for it again
    assert len(list(coreml_session.compiled_folder(package, "all").parent.iterdir())) == 1


@pytest.mark.parametrize("name", ["photos", "0123456789abcdef", "0123456789ABCDEF"])
def test_what_was_not_compiled_here_stays_in_the_cache(bundle, mac, tmp_path, name):
    """In each place that something is removed from: what has no name of ours, or is no model."""
    package = tmp_path / VISION
    shutil.copytree(bundle.path / VISION, package)
    open_mlmodel()(package, MAIN)
    kept = coreml_session.compiled_folder(package, "all")
    (compiled,) = kept.iterdir()
    others = [kept / name / "mine.txt", compiled / "mine.txt", kept.parent / name / "mine.txt"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "vision.mlmodelc").mkdir()
    (kept / "fedcba9876543210").symlink_to(tmp_path / "photos")
    specification = next(package.rglob("*.mlmodel"))
    specification.write_bytes(specification.read_bytes())
    open_mlmodel()(package, MAIN)
    coreml_session.forget_compiled(package, "all")
    assert not list(compiled.glob("*.mlmodelc"))
    assert [path.read_text() for path in others] == ["mine"] * 3
    assert (tmp_path / "photos" / "vision.mlmodelc").is_dir()


def test_a_failed_compilation_leaves_nothing_behind_and_says_why(bundle, mac, monkeypatch):
    def fail(model, destination_path=None):
        Path(destination_path).mkdir()
        raise RuntimeError("Error compiling model: no such op")

    monkeypatch.setattr(utils, "compile_model", fail)
    with pytest.raises(ExportError, match=r"cannot be loaded by Core ML: .*no such op"):
        open_mlmodel()(bundle.path / VISION, MAIN)
    assert not coreml_session.compiled_folder(bundle.path / VISION, "all").exists()


def test_what_core_ml_says_while_running_is_one_error(bundle, mac):
    model = open_mlmodel()(bundle.path / VISION, MAIN)
    with pytest.raises(ExportError, match=f"{VISION}.*cannot be run by Core ML: Error computing"):
        model.predict({"pixels": np.ones(1, np.float32)})


def test_a_function_that_is_not_there_is_named(bundle, mac):
    with pytest.raises(ExportError, match="no function 'train', but prefill, decode"):
        open_mlmodel()(bundle.path / DECODER, "train")
    with pytest.raises(ExportError, match="no function 'train', but main"):
        open_mlmodel()(bundle.path / VISION, "train")


@pytest.mark.parametrize("damage", ["empty", "noise"])
def test_a_package_that_cannot_be_read_is_one_error(mac, tmp_path, damage, bundle):
    package = tmp_path / VISION
    if damage == "empty":
        package.mkdir()
    else:
        shutil.copytree(bundle.path / VISION, package)
        next(package.rglob("*.mlmodel")).write_bytes(b"\xff" * 100)
    with pytest.raises(ExportError, match="no Core ML package that can be read"):
        open_mlmodel()(package, MAIN)


def test_opening_a_package_changes_none_of_its_files(bundle, mac):
    files = [path for path in bundle.path.rglob("*") if path.is_file()]
    before = [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
    CoreMLSession(bundle, open_mlmodel())
    assert [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in files] == before


def test_a_specification_outside_the_package_is_refused(bundle, mac, tmp_path):
    package = tmp_path / VISION
    shutil.copytree(bundle.path / VISION, package)
    shutil.move(next(package.rglob("*.mlmodel")), tmp_path / "model.mlmodel")
    manifest = package / "Manifest.json"
    said = manifest.read_text("utf-8")
    manifest.write_text(re.sub(r"com.apple.CoreML.{1,2}model.mlmodel", "../../model.mlmodel", said))
    assert manifest.read_text("utf-8") != said
    with pytest.raises(ExportError, match="lies outside the package"):
        open_mlmodel()(package, MAIN)


def test_units_that_there_are_not_are_refused():
    with pytest.raises(ExportError, match="no compute units 'npu'") as caught:
        open_mlmodel("npu")
    assert "cpu-and-ne" in caught.value.hint


@pytest.mark.parametrize(
    ("system", "release", "here"),
    [("Linux", "", "Linux"), ("Darwin", "14.6", "macOS 14.6"), ("", "", "unknown system")],
)
def test_core_ml_elsewhere_is_one_error(monkeypatch, system, release, here):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), ""))
    with pytest.raises(ExportError, match=f"macOS 15 or later; this is.*{here}") as caught:
        open_mlmodel()
    assert "bench" in caught.value.hint


def test_flexible_shapes_are_read_in_either_form():
    array = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType()
    array.shape.extend([1, 3])
    assert coreml_session._shape(array) == (1, 3)
    for length in (1, 64):
        array.enumeratedShapes.shapes.add().shape.extend([1, length])
    assert coreml_session._shape(array) == (1, -1)
