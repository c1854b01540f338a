"""`bench` of a Core ML bundle from end to end, as on a Mac: only Core ML itself is stood in for."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, models

from fastvlm_export.exporter import running
from fastvlm_export.exporter.bundle import SCHEMA, Bundle, Manifest, Source, files_of
from fastvlm_export.exporter.preprocess import Preprocessing, Strategy
from fastvlm_export.exporter.prompt import IMAGE_TOKEN, TEMPLATE
from fastvlm_export.exporter.running import BenchRequest
from fastvlm_export.validate import latency_process, placement, terminal
from fastvlm_export.validate.latency import Part, Plan
from fastvlm_export.validate.placement import Device
from fastvlm_export.validate.placement_view import placement as view

from ..targets import coreml_packages as toy
from ..targets import coreml_stand_ins as stand_ins

TESTS = Path(__file__).parents[1]
WORKER = """
import sys
# coremltools imports them, to convert models of theirs: seconds of each process.
sys.modules |= dict.fromkeys(("executorch", "sklearn", "torchao"))
import coreml_stand_ins
from fastvlm_export.validate import latency_worker
coreml_stand_ins.install(setattr)
latency_worker.main()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "bundle"
    toy.write_bundle(folder)
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(toy.V)}, "word0"))
    words.save(str(folder / "tokenizer.json"))
    manifest = Manifest(
        schema=SCHEMA,
        source=Source(name="toy", layout="random", sha256="0" * 64),
        target="coreml",
        recipe={"name": "fp16"},
        quantization={},
        resolution=toy.R,
        context=toy.CONTEXT,
        image_tokens=toy.N,
        preprocessing=Preprocessing(strategy=Strategy.PAD, resolution=toy.R),
        prompt_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
        image_token_id=99,
        eos_token_ids=(98,),
        model={},
        graphs={},
        versions={},
        files=files_of(folder),
        artifact={"layout": "fastvlm"},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return Bundle(path=folder, manifest=manifest)


@pytest.fixture
def mac(monkeypatch, tmp_path):
    stand_ins.install(monkeypatch.setattr)
    (tmp_path / "mac_worker.py").write_text(WORKER)
    paths = [str(tmp_path), str(TESTS / "targets")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(latency_process, "WORKER", "mac_worker")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_bench_times_loading_and_answering_and_places_operations(bundle, mac, tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (30, 20), "red").save(image)
    request = BenchRequest(
        bundle=bundle.path,
        image=image,
        compute_units=("cpu-and-ne",),
        plan=Plan(warmup=0, runs=2, least_runs=1, tokens=3, loads=1),
    )
    found = running.bench(request)
    (ours,) = found.latency.subjects
    assert ours.name == "coreml, cpu-and-ne"
    assert "fp16; coremltools" in ours.setting
    assert ours.load_note.startswith("cold: compiled anew")
    assert (ours.load_cold.n, ours.load_warm.n, ours.ttft.n) == (1, 1, 2)
    assert set(ours.parts) == set(Part)
    assert found.latency.machine.system.startswith("macOS 15.1")
    document = json.loads(json.dumps(found.to_dict()))
    assert document["subjects"][0]["decoded_tokens"] == 3
    (placed,) = document["placement"]
    names = [(one["package"], one["function"]) for one in placed["functions"]]
    assert names[:2] == [("vision.mlpackage", "main"), ("embedding.mlpackage", "main")]
    assert sorted(names[2:]) == [("decoder.mlpackage", "decode"), ("decoder.mlpackage", "prefill")]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(terminal.latency(found.latency), view(found.placements))
    assert "cpu-and-ne" in capture.get()


def test_a_saved_programs_operations_are_counted_without_constants(bundle, mac):
    found = placement.measure(bundle, "all")
    decode = next(one for one in found.functions if one.function == "decode")
    types = [one.op_type for one in decode.operations]
    assert "const" not in types
    assert {"read_state", "write_state", "slice_update", "matmul"} <= set(types)
    assert {one.op_type for one in decode.fallen} == {"matmul"}
    assert len(decode.fallen) == types.count("matmul") == 3
    shares = [decode.share_of_operations(one) for one in Device]
    assert sum(shares) == pytest.approx(1)
    embedding = next(one for one in found.functions if one.package.startswith("embedding"))
    assert [one.op_type for one in embedding.fallen] == ["gather"]
