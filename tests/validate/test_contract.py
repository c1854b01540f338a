"""What clients read beside the numbers: right as exported, and each value altered in turn."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from fastvlm_export.exporter import bundle as bundles
from fastvlm_export.exporter import prompt
from fastvlm_export.exporter.bundle import MANIFEST, Manifest, Source, files_of, open_bundle
from fastvlm_export.exporter.source import SourceRequest, contract, load_source
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import onnx as target
from fastvlm_export.targets import transformers_js
from fastvlm_export.validate.contract import Contract, compare_contract
from fastvlm_export.validate.proof_types import Reference


@pytest.fixture(scope="module")
def reference() -> Reference:
    checkpoint = load_source(SourceRequest())
    return Reference(checkpoint=checkpoint, spec=contract(checkpoint, None, None))


def graph(kind: int, name: str, sizes: list[str | int]) -> onnx.ModelProto:
    """A graph that does nothing, between two tensors of that shape."""
    given = helper.make_tensor_value_info(name, kind, sizes)
    made = helper.make_tensor_value_info("out", kind, sizes)
    node = helper.make_node("Identity", [name], ["out"])
    return helper.make_model(helper.make_graph([node], "g", [given], [made]))


@pytest.fixture
def onnx_bundle(reference: Reference, tmp_path: Path) -> Path:
    """The contract of a bundle, around graphs that are none of FastVLM's."""
    folder, spec, checkpoint = tmp_path / "onnx-bundle", reference.spec, reference.checkpoint
    (folder / "onnx").mkdir(parents=True)
    for file in target.files(RECIPES["fp32"]).values():
        onnx.save(graph(TensorProto.FLOAT, "x", ["batch_size", 3]), folder / file)
    transformers_js.write_client_files(spec, "fp32", {}, folder)
    tensors = {
        "inputs": {"x": "float32[batch_size,3]"},
        "outputs": {"out": "float32[batch_size,3]"},
    }
    manifest = Manifest(
        schema=bundles.SCHEMA,
        source=Source(name=checkpoint.name, layout=checkpoint.layout, sha256=checkpoint.sha256),
        target="onnx",
        recipe=RECIPES["fp32"].to_dict(),
        quantization={},
        resolution=spec.preprocessing.resolution,
        context=spec.context,
        image_tokens=spec.image_tokens,
        preprocessing=spec.preprocessing,
        prompt_template=prompt.TEMPLATE,
        image_token=prompt.IMAGE_TOKEN,
        image_token_id=spec.image_token_id,
        eos_token_ids=spec.eos_token_ids,
        model=asdict(checkpoint.config),
        graphs=dict.fromkeys(target.STEMS, tensors),
        versions={},
        files=files_of(folder),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return folder


@pytest.fixture(params=["onnx", "executorch", "tensorrt"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    if request.param == "onnx":
        found: Path = request.getfixturevalue("onnx_bundle")
        return found
    pytest.importorskip({"executorch": "executorch", "tensorrt": "tensorrt_rtx"}[request.param])
    source = request.getfixturevalue(f"{request.param}_fp32")
    return Path(shutil.copytree(source, tmp_path / "copy"))


def changed(folder: Path, file: str, change: Callable[[Any], None]) -> None:
    """Change a JSON file, and make the manifest's hashes right."""
    content = json.loads((folder / file).read_text("utf-8"))
    change(content)
    (folder / file).write_text(json.dumps(content), "utf-8")
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    hashes = files_of(folder)
    manifest["files"] = {name: hashes[name] for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def compared(folder: Path, reference: Reference) -> Contract:
    return compare_contract(open_bundle(folder), reference)


def set_to(key: str, value: object) -> Callable[[Any], None]:
    """`a.b.c` = value."""

    def change(content: Any) -> None:
        *outer, last = key.split(".")
        for name in outer:
            content = content[name]
        assert content[last] != value
        content[last] = value

    return change


def test_a_bundle_as_exported_is_right(bundle: Path, reference: Reference) -> None:
    found = compared(bundle, reference)
    assert found.passed, found.verdict
    assert found.values > 700
    assert {MANIFEST, "config.json", "tokenizer.json", "preprocessor_config.json"} <= set(
        found.files
    )


FAULTS = [
    (MANIFEST, "preprocessing.mean", [0.5, 0.5, 0.5]),
    (MANIFEST, "preprocessing.std", [0.5, 0.5, 0.5]),
    (MANIFEST, "preprocessing.strategy", "crop"),
    (MANIFEST, "preprocessing.resampling", "bilinear"),
    (MANIFEST, "image_tokens", 15),
    (MANIFEST, "image_token_id", 5),
    (MANIFEST, "eos_token_ids", [1]),
    (MANIFEST, "prompt_template", "plain"),
    (MANIFEST, "model.decoder.rope_theta", 1e4),
    (MANIFEST, "graphs.vision.inputs", {"image": "float32[1,3,256,256]"}),
    ("config.json", "rope_theta", 1e4),
    ("config.json", "max_position_embeddings", 512),
    ("config.json", "tie_word_embeddings", 1),  # equal to true in Python
    ("config.json", "image_token_index", 3),
    ("generation_config.json", "eos_token_id", 1),
    ("preprocessor_config.json", "image_std", [0.5, 0.5, 0.5]),
    ("preprocessor_config.json", "rescale_factor", 1 / 256),
    ("preprocessor_config.json", "resample", 2),
    ("preprocessor_config.json", "do_normalize", False),
    ("processor_config.json", "patch_size", 16),
    ("tokenizer_config.json", "chat_template", "{{ messages[0]['content'] }}"),
    ("tokenizer.json", "model.merges", []),
]


@pytest.mark.parametrize("bundle", ["onnx", "executorch", "tensorrt"], indirect=True)
def test_every_altered_value_is_named(bundle: Path, reference: Reference) -> None:
    for file, key, value in FAULTS:
        before = {name: (bundle / name).read_bytes() for name in {file, MANIFEST}}
        if key == "tie_word_embeddings":
            content = json.loads(before[file])
            content[key] = value
            changed(bundle, file, lambda found, content=content: found.update(content))  # type: ignore[misc]
        else:
            changed(bundle, file, set_to(key, value))
        found = compared(bundle, reference)
        assert not found.passed, (file, key)
        assert all(one.file == file for one in found.differences), found.verdict
        # The tokenizer's own library may write an altered one otherwise.
        named = key.rpartition(".")[2] if file != "tokenizer.json" else ""
        assert any(named in one.key for one in found.differences), (key, found.verdict)
        for name, content in before.items():
            (bundle / name).write_bytes(content)
    assert compared(bundle, reference).passed


def test_keys_that_are_missing_or_added_are_named(onnx_bundle: Path, reference: Reference) -> None:
    changed(onnx_bundle, "config.json", lambda content: content.pop("head_dim"))
    changed(onnx_bundle, "generation_config.json", lambda content: content.update(do_sample2=True))
    found = compared(onnx_bundle, reference)
    assert [(one.file, one.key, one.found) for one in found.differences] == [
        ("config.json", "head_dim", "absent"),
        ("generation_config.json", "do_sample2", "true"),
    ]
    assert "config.json: head_dim is absent, not 32" in found.verdict


def test_a_client_s_file_that_is_gone_or_no_json(onnx_bundle: Path, reference: Reference) -> None:
    (onnx_bundle / "config.json").unlink()
    (onnx_bundle / "processor_config.json").write_text("{", "utf-8")
    manifest = json.loads((onnx_bundle / MANIFEST).read_text("utf-8"))
    manifest["files"] = files_of(onnx_bundle)
    (onnx_bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    found = compared(onnx_bundle, reference)
    assert [(one.file, one.found) for one in found.differences] == [
        ("config.json", "missing"),
        ("processor_config.json", '"{"'),
    ]


def test_another_context_of_the_manifest_alone_shows(
    onnx_bundle: Path, reference: Reference
) -> None:
    """`validate` takes it from there; the client's files still have the old one."""
    changed(onnx_bundle, MANIFEST, set_to("context", 512))
    spec = contract(reference.checkpoint, None, 512)
    found = compared(onnx_bundle, Reference(checkpoint=reference.checkpoint, spec=spec))
    assert {one.key for one in found.differences} == {"max_position_embeddings", "model_max_length"}


def test_nothing_compared_does_not_pass() -> None:
    found = Contract(files=(), values=0, differences=())
    assert not found.passed
    assert "Nothing" in found.verdict
