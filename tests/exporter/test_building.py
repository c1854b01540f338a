"""`build`: engines put into a bundle that exists, or the bundle left as it was."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter import building
from fastvlm_export.exporter.bundle import files_of, open_bundle
from fastvlm_export.targets import tensorrt, tensorrt_build
from fastvlm_export.targets import tensorrt_package as packages
from fastvlm_export.targets.tensorrt_build import write_plan
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import PLAN, engine_file, onnx_file, read_plan
from fastvlm_export.targets.tensorrt_record import RECORD, read_record

from ..targets import tensorrt_bundles as toys
from .commands import Run, bad

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.bundle(tmp_path_factory.mktemp("building") / "bundle").path


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, str]:
    return {**files_of(folder), "manifest": (folder / "manifest.json").read_text()}


def test_engines_for_other_gpus_take_the_place_of_the_old_ones(bundle: Path, run: Run) -> None:
    (bundle / "report").mkdir(exist_ok=True)
    (bundle / "report" / "report.html").write_text("of the engines before")
    before = (bundle / onnx_file("decoder")).stat().st_ino
    result = run("build", bundle, "--compute-capability", "8.9,sm_86", "--json", "--quiet")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert told["passed"]
    assert told["engines"]["compute_capabilities"] == ["86", "89"]
    opened = open_bundle(bundle)
    assert opened.manifest.artifact["compute_capabilities"] == "86,89"
    assert read_plan(bundle).compute_capabilities == ("86", "89")
    assert read_record(bundle).compute_capabilities == ("86", "89")
    assert not (bundle / "report" / "report.html").exists()  # it spoke of other engines
    assert (bundle / onnx_file("decoder")).stat().st_ino == before  # not copied
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("name", ["notes.txt", "onnx/notes.txt", "report/notes.txt"])
def test_a_bundle_that_somebody_added_to_is_not_replaced(name: str, bundle: Path, run: Run) -> None:
    (bundle / name).write_text("the user's own")
    before = contents(bundle)
    bad(run("build", bundle, "--quiet"), name, "Move it away")
    assert contents(bundle) == before


def test_what_is_added_to_a_bundle_during_the_build_is_left_alone(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)

    def late(*given: Any, **named: Any) -> Any:
        (bundle / "notes.txt").write_text("the user's own")
        return real(*given, **named)

    real = tensorrt_build.run
    monkeypatch.setattr(tensorrt_build, "run", late)
    bad(run("build", bundle, "--quiet"), "notes.txt", f"{bundle}.new")
    (bundle / "notes.txt").unlink()
    assert contents(bundle) == before
    open_bundle(bundle.with_name("bundle.new"))


def test_a_bundle_that_was_replaced_during_the_build_is_left_alone(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines are of the graphs that were there before."""

    def late(*given: Any, **named: Any) -> Any:
        toys.sealed(bundle, image_tokens=5)
        return real(*given, **named)

    real = tensorrt_build.run
    monkeypatch.setattr(tensorrt_build, "run", late)
    bad(run("build", bundle, "--quiet"), "replaced", f"{bundle}.new")
    assert open_bundle(bundle).manifest.image_tokens == 5
    open_bundle(bundle.with_name("bundle.new"))


def test_a_bundle_behind_a_link_is_built(bundle: Path, run: Run) -> None:
    bundle.with_name("link").symlink_to(bundle)
    assert run("build", bundle.with_name("link"), "--quiet").code == 0
    assert bundle.with_name("link").is_symlink()
    open_bundle(bundle)


def test_by_the_same_plan_the_same_engines_come_out(bundle: Path, run: Run) -> None:
    before = contents(bundle)
    for name in ("vision", "embedding", "decoder"):
        (bundle / engine_file(name)).unlink()
    (bundle / "engines").rmdir()
    toys.sealed(bundle)
    result = run("build", bundle)
    assert result.code == 0
    assert "fastvlm-export validate" in result.out
    assert "No engine was loaded or run" in result.out.replace("\n", " ")
    after = contents(bundle)
    assert {name: after[name] for name in after if name != "manifest"} == {
        name: before[name] for name in before if name != "manifest"
    }


def test_a_bundle_without_engines_gets_some(tmp_path: Path, run: Run) -> None:
    folder = toys.bundle(tmp_path / "bundle", engines=False).path
    assert open_bundle(folder).manifest.artifact["engines"] == 0
    assert run("build", folder, "--quiet").code == 0
    assert open_bundle(folder).manifest.artifact["engines"] == 1
    assert (folder / engine_file("decoder")).is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "cuda"], ["--backend cuda", "tensorrt-rtx, tensorrt"]),
        (["--backend", "tensorrt"], ["tensorrt is not installed", "NVIDIA"]),
        (["--compute-capability", "90"], ["not for 90", "80, 86, 89", "fastvlm-export targets"]),
        (["--compute-capability", ""], ["--compute-capability"]),
        (
            ["--backend", "tensorrt", "--compute-capability", "80"],
            ["builds for the GPU that it runs on"],
        ),
    ],
)
def test_what_cannot_be_built_is_one_error(
    arguments: list[str], words: list[str], bundle: Path, run: Run
) -> None:
    before = contents(bundle)
    bad(run("build", bundle, *arguments, "--quiet"), *words)
    assert contents(bundle) == before


def test_float8_is_refused_for_gpus_that_have_none(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def problems(*_: Any, options: Any, **__: Any) -> list[str]:
        return [f"8-bit floats on {one}" for one in options.compute_capabilities if int(one) < 89]

    monkeypatch.setattr(tensorrt, "problems", problems)
    bad(run("build", bundle, "--quiet"), "8-bit floats on 80", "--compute-capability")
    assert run("build", bundle, "--compute-capability", "89", "--quiet").code == 0


def test_tensorrt_is_built_where_its_gpu_is(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is there, the GPU is not."""
    monkeypatch.setattr(packages, "load", lambda _: object())
    before = contents(bundle)
    result = run("build", bundle, "--backend", "tensorrt", "--quiet")
    bad(result, "builds on the GPU that it is for", "--backend tensorrt-rtx")
    assert contents(bundle) == before


def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)
    monkeypatch.setattr(tensorrt_build, "WORKER", "no_such_module")
    bad(run("build", bundle, "--quiet"), "ended without an engine")
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_an_interrupted_build_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt_build, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        building.build(building.BuildRequest(bundle=bundle))
    assert contents(bundle) == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_engines_that_do_not_pass_are_not_published(bundle: Path, run: Run) -> None:
    plan = read_plan(bundle)
    changed = dataclasses.replace(
        plan.graphs["vision"], float32_nodes={"gone/Node": "norm statistics"}
    )
    write_plan(bundle, dataclasses.replace(plan, graphs={**plan.graphs, "vision": changed}))
    toys.sealed(bundle)
    before = contents(bundle)
    result = run("build", bundle, "--json", "--quiet")
    assert result.code == 1
    assert not json.loads(result.out)["passed"]
    assert "gone/Node" in result.out
    assert contents(bundle) == before


def test_a_bundle_of_another_target_has_nothing_to_build(bundle: Path, run: Run) -> None:
    toys.sealed(bundle, target="onnx")
    bad(run("build", bundle, "--quiet"), "target 'onnx'", "--target tensorrt")


@pytest.mark.parametrize("name", [PLAN, RECORD, "onnx/decoder.onnx"])
def test_a_damaged_bundle_is_one_error(name: str, bundle: Path, run: Run) -> None:
    (bundle / name).write_bytes(b"{}")
    bad(run("build", bundle, "--quiet"), name, "differs from the hash")


def test_a_hostile_plan_is_one_error(bundle: Path, run: Run) -> None:
    values = json.loads((bundle / PLAN).read_text())
    values["graphs"]["vision"]["engine"] = "../../outside.engine"
    (bundle / PLAN).write_text(json.dumps(values))
    toys.sealed(bundle)
    bad(run("build", bundle, "--quiet"), PLAN, "../../outside.engine")
    assert not list(bundle.parent.parent.glob("*.engine"))


def test_no_bundle_at_all_is_one_error(tmp_path: Path, run: Run) -> None:
    bad(run("build", tmp_path), "is not a bundle")


def test_tensorrts_own_backend_is_built_with_its_package(
    bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would happen where the package and its GPU are: RTX's package stands in for both."""
    monkeypatch.setitem(packages.MODULES, Backend.TENSORRT, "tensorrt_rtx")
    monkeypatch.setattr(tensorrt, "gpu_to_build_on", lambda _: "NVIDIA Test")
    seen: list[bool] = []

    def pretend(folder: Path, graph: str, *, build: bool, say: Any) -> Any:
        seen.append(build)
        plan = read_plan(folder)
        assert plan.backend is Backend.TENSORRT
        assert plan.compute_capabilities == ()
        if build:
            (folder / "engines").mkdir(exist_ok=True)
            (folder / plan.graphs[graph].engine).write_bytes(bytes(1 << 20))
        return real(folder, graph, build=False, say=say)

    real = tensorrt_build.run
    monkeypatch.setattr(tensorrt_build, "run", pretend)
    result = run("build", bundle, "--backend", "tensorrt", "--json", "--quiet")
    assert result.code == 0, result.err + result.out
    assert seen == [True] * 3 + [False] * 3
    assert json.loads(result.out)["engines"]["built_on"] == "NVIDIA Test"
    assert open_bundle(bundle).manifest.artifact["built_on"] == "NVIDIA Test"
