"""A GPU's own clock beside the wall's, and engines that a cold load must compile anew."""

from types import SimpleNamespace

import pytest

from fastvlm_export.targets import TargetName, tensorrt_kernels
from fastvlm_export.validate import latency, latency_worker
from fastvlm_export.validate.latency_worker import Worker

from . import test_latency as toys

bundle, runtime = toys.bundle, toys.runtime  # fixtures

GPU_CLOCK = """
    how = "Toy GPU, CUDA graphs"
    spent = 0.0
    def take_device_seconds(self):
        spent, self.spent = self.spent, 0.0
        return spent
"""


def test_a_gpus_own_clock_is_told_beside_the_parts(bundle, runtime, tmp_path):
    runtime(fault="self.spent += 0.25")
    worker = tmp_path / "toy_worker.py"
    text = worker.read_text()
    text = text.replace("class Session:\n", f"class Session:{GPU_CLOCK}")
    text = text.replace(
        "self.length += ", "self.spent += 0.5 if embeds.shape[1] > 1 else 0.125; self.length += "
    )
    worker.write_text(text)
    ours = latency.measure([toys.subject(bundle)], toys.IMAGE, toys.PROMPT, toys.QUICK).subjects[0]
    told = {name: timing.seconds for name, timing in ours.on_device.items()}
    assert told == {"encode": (0.25,) * 3, "prefill": (0.5,) * 3, "decode": (0.5,) * 3}
    assert ours.to_dict()["on_device"]["decode"]["p50"] == 0.5
    for part in ("Toy GPU, CUDA graphs", "encode 250 ms", "prefill 500 ms", "125 ms a token"):
        assert part in ours.setting


def test_a_runtime_without_such_a_clock_tells_none(bundle, runtime):
    runtime()
    ours = latency.measure([toys.subject(bundle)], toys.IMAGE, toys.PROMPT, toys.QUICK).subjects[0]
    assert ours.on_device == {}
    assert ours.to_dict()["on_device"] == {}
    assert "clock" not in ours.setting


@pytest.mark.parametrize("compiled", [True, False])
def test_a_cold_load_of_engines_compiles_anew_where_the_package_compiles(
    bundle, monkeypatch, compiled
):
    toys.write_manifest(bundle, target="tensorrt")
    asked = []
    monkeypatch.setattr(latency_worker, "read_plan", lambda folder: f"the plan in {folder.name}")
    monkeypatch.setattr(
        tensorrt_kernels, "forget", lambda found, plan: bool(asked.append(plan)) or compiled
    )
    monkeypatch.setattr(
        latency_worker.targets,
        "get",
        lambda name: SimpleNamespace(
            RUNTIME_PACKAGES=(), availability=lambda: SimpleNamespace(versions={"tensorrt": "11"})
        ),
    )
    session = SimpleNamespace(how="Toy GPU, CUDA graphs")
    monkeypatch.setattr(latency_worker, "open_session", lambda found, compute_units: session)
    job = {"bundle": str(bundle), "backend": "bundle", "checkpoint": "", "compute_units": ""}
    worker = Worker(job)
    assert worker.bundle.manifest.target == TargetName.TENSORRT
    assert worker.load(cold=False, keep=False) == {
        "seconds": pytest.approx(0, abs=1),
        "note": "",
        "setting": "fp32; tensorrt 11",
    }
    assert asked == []
    cold = worker.load(cold=True, keep=True)
    assert asked == ["the plan in bundle"]
    assert ("compiled anew" in cold["note"]) == compiled
    assert cold["setting"] == "fp32; tensorrt 11; Toy GPU, CUDA graphs"
