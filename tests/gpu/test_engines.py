"""Engines on this machine's NVIDIA GPU: `make test-gpu`. Everywhere else these tests skip.

The bundled model is exported by the command itself for the GPU that is there, so that parity,
answers and times are the command's own; the rest is what only a GPU can show of a session.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvlm_export import targets
from fastvlm_export.exporter import listing
from fastvlm_export.exporter.bundle import Bundle, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt, tensorrt_device, tensorrt_inspect, tensorrt_package
from fastvlm_export.targets.base import Options
from fastvlm_export.targets.tensorrt_package import Backend
from fastvlm_export.targets.tensorrt_plan import read_plan
from fastvlm_export.targets.tensorrt_session import TensorRTSession

from ..exporter.commands import command

pytestmark = pytest.mark.gpu

RECIPES = ("fp32", "fp16", "bf16", "int8", "int4", "fp8")
CLOSE = {"fp32": 1e-4}
"""Of the largest value, two calls or two shapes may differ by that; by 2 % in narrower floats."""


def options() -> Options:
    """How to export for the GPU that is there; skips where there is none that is fit."""
    if not tensorrt_package.installed():
        pytest.skip("neither tensorrt-rtx nor tensorrt is installed")
    backend = tensorrt_package.backend_of(Options())
    problem = tensorrt_device.driver_problem(backend, tensorrt_package.version(backend))
    gpu = tensorrt_device.find_gpu()
    if problem or gpu is None:
        pytest.skip(problem or "no NVIDIA GPU was found")
    if not tensorrt.has_cuda():
        pytest.skip("cuda-bindings is not installed")
    rtx = backend is Backend.RTX
    found = Options(backend=backend, compute_capabilities=(gpu.capability,) if rtx else None)
    if problems := tensorrt.option_problems(found):
        pytest.skip("; ".join(problems))
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Recipe -> the bundle and its report, exported once each."""
    found: dict[str, tuple[Path, Any]] = {}

    def export(recipe: str) -> tuple[Path, Any]:
        chosen = options()
        if recipe not in listing.recipes(targets.get("tensorrt"), chosen):
            pytest.skip(f"recipe {recipe} cannot be had on this GPU")
        if recipe not in found:
            out = tmp_path_factory.mktemp("gpu") / recipe
            arguments = ["--target", "tensorrt", "--backend", chosen.backend, "--recipe", recipe]
            if chosen.compute_capabilities:
                arguments += ["--compute-capability", ",".join(chosen.compute_capabilities)]
            done = subprocess.run(
                command(*arguments, "--out", out, "--runs", 5, "--json"),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode in (0, 1), done.stderr
            bundle = json.loads(done.stdout)["bundles"][0]
            found[recipe] = Path(bundle["path"]), bundle["report"]
        return found[recipe]

    return export


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_proves_and_times_engines_on_the_gpu(
    exported: Callable[[str], tuple[Path, Any]], recipe: str
) -> None:
    _, report = exported(recipe)
    assert report["runtime"]["device"], report["runtime"]
    assert report["passed"], report["verdict"]
    timed = report["latency"]["subjects"][0]
    gpu = tensorrt_device.find_gpu()
    assert gpu
    assert gpu.name in timed["setting"]
    assert "CUDA graphs" in timed["setting"], "decoding was not captured"
    for part, timing in timed["on_device"].items():
        whole = timed["decode"] if part == "decode" else timed["parts"][part]
        assert 0 < timing["p50"] <= whole["p50"], part
    print(recipe, timed["setting"], timed["tokens_per_second"], "tokens/s")


@pytest.mark.parametrize("recipe", RECIPES)
def test_engines_read_back_are_as_planned(
    exported: Callable[[str], tuple[Path, Any]], recipe: str
) -> None:
    folder, _ = exported(recipe)
    for found in tensorrt_inspect.read_back(folder):
        print(found)
        assert found.problems == ()
        assert found.layers > 0
        if found.graph == "decoder":
            outputs = read_plan(folder).graphs["decoder"].outputs
            assert set(found.in_place) == set(outputs) - {"logits"}, "the cache is copied"


def session_of(folder: Path) -> tuple[Bundle, TensorRTSession]:
    bundle = open_bundle(folder)
    return bundle, TensorRTSession(bundle)


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int4"])
def test_token_by_token_is_the_same_as_at_once(
    exported: Callable[[str], tuple[Path, Any]], recipe: str
) -> None:
    """Prefill and decode profiles, buckets, the cache in place, CUDA graphs: one answer."""
    folder, _ = exported(recipe)
    bundle, session = session_of(folder)
    random = np.random.default_rng(0)
    count = min(300, bundle.manifest.context)
    vocabulary = int(bundle.manifest.model["decoder"]["vocab_size"])
    ids = random.integers(0, vocabulary, (1, count))
    embeds = session.embed(ids)
    for twice in range(2):  # the second time every shape has been seen, and every graph captured
        session.reset()
        session.decode(embeds[:, :200])
        for index in range(200, count):
            stepped = session.decode(embeds[:, index : index + 1])
        session.reset()
        at_once = session.decode(embeds)
        difference = np.abs(stepped - at_once).max() / np.abs(at_once).max()
        print(recipe, "round", twice, "largest difference", difference)
        assert difference <= CLOSE.get(recipe, 0.02)


def test_a_full_context_and_one_too_many(exported: Callable[[str], tuple[Path, Any]]) -> None:
    folder, _ = exported("fp16")
    bundle, session = session_of(folder)
    context = bundle.manifest.context
    embeds = session.embed(np.zeros((1, context), np.int64))
    assert np.isfinite(session.decode(embeds[:, : context - 1])).all()
    assert np.isfinite(session.decode(embeds[:, -1:])).all()
    with pytest.raises(ExportError, match="holds"):
        session.decode(embeds[:, -1:])


def test_an_engine_that_is_cut_short_is_one_clear_error(
    exported: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = exported("fp16")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    bundle = open_bundle(copy)
    engine = copy / read_plan(copy).graphs["vision"].engine
    whole = engine.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:10], b"", bytes(1000)):
        engine.write_bytes(data)
        with pytest.raises(ExportError, match=r"damaged|another version") as caught:
            TensorRTSession(bundle)
        print(caught.value)
        assert "fastvlm-export build" in caught.value.hint


def test_an_engine_for_another_gpu_is_one_clear_error(tmp_path: Path) -> None:
    """It can be built here, and is proven by its graphs if at all; to run it is refused."""
    chosen = options()
    if chosen.compute_capabilities is None:
        pytest.skip("TensorRT builds for the GPU that it finds only")
    other = "75" if chosen.compute_capabilities != ("75",) else "120"
    out = tmp_path / "other"
    arguments = ["--target", "tensorrt", "--recipe", "fp16", "--compute-capability", other]
    done = subprocess.run(
        command(*arguments, "--out", out, "--json"), capture_output=True, text=True, check=False
    )
    print(done.stdout[-2000:], done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        assert "was built for compute capability" in done.stderr
        return
    with pytest.raises(ExportError, match="was built for compute capability") as caught:
        TensorRTSession(open_bundle(out))
    assert f"--compute-capability {chosen.compute_capabilities[0]}" in caught.value.hint
