"""The ONNX folder in ONNX Runtime against PyTorch, and the files themselves."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import load

from fastvlm_export.exporter.bundle import sha256_of
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import onnx, onnx_session
from fastvlm_export.targets.base import Artifact, available_cores
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.onnx_session import OnnxSession

from .conftest import bundle_of

LIMIT = 2e-5  # of the largest value: float32 rounding in another order


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


@pytest.fixture(scope="module")
def session(small) -> OnnxSession:
    return OnnxSession(small.paths, small.spec.context)


@pytest.fixture(scope="module")
def eager(small) -> EagerSession:
    return EagerSession(small.model, small.spec.context)


def test_image_features_are_pytorchs(session, eager) -> None:
    pixels = np.random.default_rng(0).random((1, 3, 128, 128), dtype=np.float32)
    assert relative_error(session.encode_image(pixels), eager.encode_image(pixels)) < LIMIT


def test_embeddings_are_pytorchs_and_the_image_token_has_a_row(small, session, eager) -> None:
    ids = np.array([[0, 5, small.spec.decoder.vocab_size - 1]])
    assert (session.embed(ids) == eager.embed(ids)).all()
    assert small.spec.image_token_id >= small.spec.decoder.vocab_size
    assert np.isfinite(session.embed(np.array([[small.spec.image_token_id]]))).all()


@pytest.mark.parametrize(
    "chunks",
    [[20], [10, *[1] * 10], [5, 5, 7, 1, 1, 1], [1] * 20],
    ids=["prefill", "decode", "chunked prefill", "token by token"],
)
def test_logits_are_pytorchs_with_the_cache_in_place(session, eager, chunks) -> None:
    embeds = np.random.default_rng(1).standard_normal((1, 20, 64), dtype=np.float32)
    # Twice: what an earlier run left in the buffers must not be seen.
    for _ in range(2):
        session.reset()
        eager.reset()
        done = 0
        for size in chunks:
            part = embeds[:, done : done + size]
            assert relative_error(session.decode(part), eager.decode(part)) < LIMIT
            done += size


def test_logits_are_pytorchs_with_a_growing_cache(small, eager) -> None:
    """As Transformers.js runs it: each step's present is the next one's past."""
    runtime = ort.InferenceSession(small.paths["decoder"], providers=["CPUExecutionProvider"])
    config = small.spec.decoder
    names = [node.name for node in runtime.get_inputs()][2:]
    past = [np.zeros((1, config.kv_heads, 0, config.head_dim), np.float32) for _ in names]
    embeds = np.random.default_rng(2).standard_normal((1, 12, 64), dtype=np.float32)
    eager.reset()
    done = 0
    for size in (7, 1, 3, 1):
        part, done = embeds[:, done : done + size], done + size
        feed = {"inputs_embeds": part, "attention_mask": np.ones((1, done), np.int64)}
        logits, *past = runtime.run(None, feed | dict(zip(names, past, strict=True)))
        assert past[0].shape == (1, config.kv_heads, done, config.head_dim)
        assert relative_error(logits[:, 0], eager.decode(part)) < LIMIT


def test_a_full_context_is_an_error_and_changes_nothing(small, session, eager) -> None:
    embeds = np.random.default_rng(3).standard_normal((1, small.spec.context, 64), dtype=np.float32)
    session.reset()
    eager.reset()
    session.decode(embeds[:, :-1])
    with pytest.raises(ExportError, match="context holds 160 positions"):
        session.decode(embeds[:, :2])
    eager.decode(embeds[:, :-1])
    assert relative_error(session.decode(embeds[:, -1:]), eager.decode(embeds[:, -1:])) < LIMIT


@pytest.fixture(scope="module")
def again(small, tmp_path_factory) -> tuple[Path, Artifact]:
    """Lowered once more: the folder, and what the target says of it."""
    folder = tmp_path_factory.mktemp("again")
    return folder, onnx.lower(small.programs, small.spec, small.recipe, folder)


def test_the_same_export_gives_the_same_bytes(small, again) -> None:
    folder, _ = again
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) == 9
    for file in files:
        assert sha256_of(folder / file) == sha256_of(small.folder / file), file


def test_files_hold_no_trace_of_this_machine(small) -> None:
    here = re.escape(str(Path(__file__).parents[2]).encode())
    suspicious = re.compile(rb"site-packages|/home/|/root/|/tmp/|\.py\b|torch\.|" + here)
    for path in small.paths.values():
        assert not suspicious.search(path.read_bytes()), path


def test_the_tied_table_is_stored_once_in_each_file(tied) -> None:
    table = tied.spec.decoder.vocab_size * tied.spec.decoder.hidden_size * 4
    weights = sum(p.numel() for p in tied.model.decoder.parameters()) * 4
    rotary = 2 * tied.spec.context * tied.spec.decoder.head_dim // 2 * 4
    sizes = {
        name: sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
        for name, path in tied.paths.items()
    }
    assert sizes["embedding"] < 1.1 * table
    assert sizes["decoder"] < 1.1 * (weights + rotary) + 16_000


def test_the_manifest_signature_names_every_tensor(again) -> None:
    _, artifact = again
    graphs = artifact.graphs
    assert graphs["vision"]["inputs"] == {"pixel_values": "float32[batch_size,3,128,128]"}
    assert graphs["vision"]["outputs"] == {"image_features": "float32[batch_size,4,64]"}
    decoder = graphs["decoder"]
    assert decoder["inputs"]["attention_mask"] == "int64[batch_size,total_sequence_length]"
    past = "float32[batch_size,2,past_sequence_length,16]"
    assert decoder["inputs"]["past_key_values.2.value"] == past
    assert decoder["outputs"]["logits"] == "float32[batch_size,1,259]"


@pytest.mark.parametrize("graph", ["vision", "decoder"])
def test_a_truncated_file_is_one_clear_error(small, tmp_path, graph) -> None:
    folder = shutil.copytree(small.folder, tmp_path / "bundle")
    path = folder / small.paths[graph].relative_to(small.folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExportError, match=f"{path.name} cannot be loaded"):
        onnx.open(bundle_of(folder, small.spec.context))


def test_a_truncated_data_file_is_one_clear_error(tied, tmp_path) -> None:
    folder = shutil.copytree(tied.folder, tmp_path / "bundle")
    data = folder / "onnx" / "decoder_model_merged.onnx_data_1"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(ExportError, match=r"decoder_model_merged\.onnx cannot be loaded"):
        onnx.open(bundle_of(folder, tied.spec.context))


def test_logits_are_pytorchs_with_external_data_and_a_tied_head(tied) -> None:
    session = OnnxSession(tied.paths, tied.spec.context)
    eager = EagerSession(tied.model, tied.spec.context)
    embeds = np.random.default_rng(4).standard_normal((1, 9, 64), dtype=np.float32)
    assert relative_error(session.decode(embeds), eager.decode(embeds)) < LIMIT


def test_a_missing_file_is_one_clear_error(small, tmp_path) -> None:
    bundle = SimpleNamespace(path=Path(tmp_path), manifest=small.bundle.manifest)
    with pytest.raises(ExportError, match=r"embed_tokens\.onnx cannot be loaded"):
        onnx.open(bundle)


def test_a_manifest_without_the_graphs_is_one_clear_error(small, tmp_path) -> None:
    with pytest.raises(ExportError, match="lists no onnx/vision_encoder"):
        onnx.open(bundle_of(tmp_path, small.spec.context))


def test_availability_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    here = onnx.availability()
    assert here.lower
    assert here.run
    assert set(here.versions) == {"onnx", "onnxscript", "onnxruntime"}
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else True)
    there = onnx.availability()
    assert not there.lower
    assert there.run
    assert "onnxscript not found: pip install 'fastvlm-export[onnx]'" in there.remedy


def test_threads_stay_within_the_cores_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert available_cores() == 1


def test_an_operator_that_refuses_is_one_clear_error(small, tmp_path, capfd) -> None:
    """What the fused attention says of a head size it does not take, and nothing in red."""
    folder = shutil.copytree(small.folder, tmp_path / "bundle")
    path = folder / small.paths["decoder"].relative_to(small.folder)
    model = load(path)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            (heads,) = (a for a in node.attribute if a.name == "num_heads")
            heads.i = 8  # half as wide: no multiple of 16 any more
    path.write_bytes(model.SerializeToString())
    opened = onnx.open(bundle_of(folder, small.spec.context))
    with pytest.raises(ExportError) as raised:
        opened.decode(np.zeros((1, 1, 64), np.float32))
    assert "\n" not in raised.value.message
    assert raised.value.message.startswith(
        f"{path} cannot be run by ONNX Runtime {ort.__version__}: GroupQ"
    )
    assert "ONNXRuntimeError" not in raised.value.message
    assert raised.value.hint == "Export it again: fastvlm-export --target onnx --out DIR --force"
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("[ONNXRuntimeError] : 1 : FAIL : Fatal error: a", "Fatal error: a"),
        (
            "Error in execution: Non-zero status code returned while running Pad node. "
            "Name:'Pad_3' Status Message: too small\nstack",
            "Pad ('Pad_3'): too small",
        ),
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while "
            "running Pad node. Name:'' Status Message: b",
            "Pad (''): b",
        ),
        ("anything else\nand more", "anything else"),
        ("", ""),
    ],
)
def test_a_cause_is_one_line_without_codes(said, cause) -> None:
    assert onnx_session.cause(RuntimeError(said)) == cause
