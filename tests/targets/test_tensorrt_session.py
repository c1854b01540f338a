"""The session's own work, without a GPU: buffers, masks, buckets, graphs, times.

CUDA and TensorRT are stood in for (see `tensorrt_stand_ins`); numbers are PyTorch's.
"""

import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import tensorrt_kernels
from fastvlm_export.targets.tensorrt_package import Backend

from . import tensorrt_opened
from .conftest import normal, worst
from .cuda_stand_in import CudaApi
from .tensorrt_opened import CONTEXT, Exported, ids, pixels
from .tensorrt_stand_ins import RUN_SECONDS

CLOSE = 2e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return tensorrt_opened.exported(tmp_path_factory)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


FLAVOURS = pytest.mark.parametrize(
    ("backend", "in_place"),
    [
        (Backend.RTX, True),
        (Backend.RTX, False),
        (Backend.TENSORRT, True),
        (Backend.TENSORRT, False),
    ],
)


@FLAVOURS
def test_a_session_computes_what_pytorch_does(
    exported: Exported, backend: Backend, in_place: bool
) -> None:
    ours, eager = exported.opens(backend=backend, in_place=in_place).session, exported.eager
    assert worst(ours.encode_image(pixels()), eager.encode_image(pixels())) < CLOSE
    assert worst(ours.embed(ids(1)), eager.embed(ids(1))) < CLOSE
    assert worst(ours.embed(ids(CONTEXT)), eager.embed(ids(CONTEXT))) < CLOSE
    eager.reset()
    # A prompt, answers across two borders of buckets, a second question, more answers.
    for step, new in enumerate((250, *[1] * 10, 240, *[1] * 15, 30, *[1] * 5)):
        embeds = normal(1, new, 64, seed=step)
        assert worst(ours.decode(embeds), eager.decode(embeds)) < CLOSE, step
    assert ours.past == 250 + 10 + 240 + 15 + 30 + 5


@FLAVOURS
def test_after_a_reset_nothing_of_the_last_prompt_is_seen(
    exported: Exported, backend: Backend, in_place: bool
) -> None:
    ours, eager = exported.opens(backend=backend, in_place=in_place).session, exported.eager
    eager.reset()
    ours.decode(normal(1, 300, 64, seed=1))
    ours.decode(np.full((1, 1, 64), np.nan, np.float32))
    ours.reset()
    for step, new in enumerate((20, 1, 1, 1)):
        embeds = normal(1, new, 64, seed=100 + step)
        assert worst(ours.decode(embeds), eager.decode(embeds)) < CLOSE


def test_results_are_the_callers_own(exported: Exported) -> None:
    ours = exported.opens().session
    first = ours.embed(ids(3))
    kept = first.copy()
    ours.embed(ids(4))
    np.testing.assert_array_equal(first, kept)
    given = normal(1, 5, 64)
    ours.decode(given)
    np.testing.assert_array_equal(given, normal(1, 5, 64))


def test_the_contexts_end_is_kept_and_can_be_reached(exported: Exported) -> None:
    ours = exported.opens().session
    ours.decode(normal(1, CONTEXT - 1, 64))
    ours.decode(normal(1, 1, 64))
    with pytest.raises(ExportError, match=f"holds {CONTEXT} positions; {CONTEXT} are taken"):
        ours.decode(normal(1, 1, 64))
    with pytest.raises(ExportError, match="0 are taken and 601 more"):
        ours.embed(ids(CONTEXT + 1))
    ours.reset()
    assert np.isfinite(ours.decode(normal(1, 2, 64))).all()


def test_no_memory_is_taken_in_a_call_and_all_is_given_back(
    exported: Exported,
) -> None:
    machine = exported.opens()
    ours, api = machine.session, machine.api
    taken, pinned = api.taken, len(api.host)
    ours.encode_image(pixels())
    ours.decode(ours.embed(ids(40)))
    for _ in range(3):
        ours.decode(normal(1, 1, 64))
    ours.reset()
    assert (api.taken, len(api.host)) == (taken, pinned)
    cache = sum(size for size in ours._cache.bytes.values())
    assert cache == 3 * 2 * 2 * CONTEXT * 16 * 4, "three layers, keys and values, two heads"
    del ours, machine
    gc.collect()
    assert (api.taken, api.device, api.host, api.events, api.streams) == (0, {}, {}, {}, set())


def test_the_cache_stays_where_it_is(exported: Exported) -> None:
    """One set of buffers, bound once; no copies but of inputs and outputs."""
    machine = exported.opens()
    ours, api = machine.session, machine.api
    before = {name: dict(one.addresses) for name, one in machine.contexts("decoder").items()}
    assert before["prefill"] == before["decode"]
    ours.decode(normal(1, 40, 64))
    api.calls.clear()
    ours.decode(normal(1, 1, 64))
    copies = [call for call in api.calls if call == "cudaMemcpyAsync"]
    assert len(copies) == 3, "embeddings and mask there, logits back"
    assert before == {n: one.addresses for n, one in machine.contexts("decoder").items()}
    assert len(exported.opens(in_place=False).session._cache.sets) == 2


def test_decoding_keeps_its_shape_for_256_tokens(exported: Exported) -> None:
    """What TensorRT for RTX records again and again would cost more than it saves."""
    machine = exported.opens()
    ours, decode = machine.session, machine.contexts("decoder")["decode"]
    assert decode.config.cuda_graph_strategy == 1
    assert machine.contexts("decoder")["prefill"].config.cuda_graph_strategy == 0
    ours.decode(normal(1, 200, 64))
    for _ in range(56):
        ours.decode(normal(1, 1, 64))
    assert (decode.runs, decode.recordings) == (56, 1)
    assert decode.shapes["attention_mask"] == (1, 256)
    ours.decode(normal(1, 1, 64))
    assert (decode.recordings, decode.shapes["attention_mask"]) == (2, (1, 512))
    ours.decode(normal(1, CONTEXT - 257, 64)[:, :300])
    ours.decode(normal(1, 1, 64))
    assert decode.shapes["attention_mask"] == (1, CONTEXT), "no more than the context"


def test_tensorrt_decodes_by_a_captured_graph(exported: Exported) -> None:
    machine = exported.opens(backend=Backend.TENSORRT)
    ours, api = machine.session, machine.api
    decode = machine.contexts("decoder")["decode"]
    ours.decode(normal(1, 250, 64))
    for _ in range(5):
        ours.decode(normal(1, 1, 64))
    assert decode.runs == 2, "once as it is, once recorded"
    assert api.calls.count("cudaGraphLaunch") == 4
    assert len(api.graphs) == 1
    ours.decode(normal(1, 10, 64))
    ours.decode(normal(1, 1, 64))  # in the next bucket
    assert len(api.graphs) == 1, "the graph of the shapes before is given back"
    assert "CUDA graphs" in ours.how


def test_two_sets_of_buffers_have_a_graph_each(exported: Exported) -> None:
    machine = exported.opens(backend=Backend.TENSORRT, in_place=False)
    machine.session.decode(normal(1, 20, 64))
    for _ in range(7):
        machine.session.decode(normal(1, 1, 64))
    assert len(machine.api.graphs) == 2
    assert machine.api.calls.count("cudaGraphLaunch") == 5
    assert "two sets" in machine.session.how


def test_where_nothing_can_be_captured_decoding_goes_on_and_says_so(exported: Exported) -> None:
    api = CudaApi()
    api.refuses_capture = True
    ours, eager = exported.opens(backend=Backend.TENSORRT, api=api).session, exported.eager
    eager.reset()
    for step, new in enumerate((20, 1, 1, 1)):
        embeds = normal(1, new, 64, seed=step)
        assert worst(ours.decode(embeds), eager.decode(embeds)) < CLOSE
    assert api.calls.count("cudaStreamBeginCapture") == 1
    assert "no CUDA graph" in ours.how
    assert "capture invalidated" in ours.how


def test_device_time_is_of_the_engines_alone(exported: Exported) -> None:
    ours = exported.opens().session
    ours.take_device_seconds()
    ours.encode_image(pixels())
    assert ours.take_device_seconds() == pytest.approx(RUN_SECONDS)
    ours.decode(ours.embed(ids(7)))
    assert ours.take_device_seconds() == pytest.approx(2 * RUN_SECONDS)
    assert ours.take_device_seconds() == 0


def refuse(*_: object, **__: object) -> None:
    raise PermissionError("no")


def test_kernels_that_can_not_be_kept_are_no_error(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_kernels, "folder", refuse)
    machine = exported.opens(hashes=True)
    machine.session.encode_image(pixels())
    assert [one.compiled for one in machine.package.kernels] == [1, 0, 0]
    api = machine.api
    del machine
    gc.collect()
    assert api.taken == 0


def test_compiled_kernels_are_kept_for_the_next_process(
    exported: Exported, cache_folder: Path
) -> None:
    machine = exported.opens(hashes=True)
    machine.session.encode_image(pixels())
    machine.session.decode(normal(1, 20, 64))
    assert [one.compiled for one in machine.package.kernels] == [1, 0, 1]
    del machine
    gc.collect()
    files = sorted(path.name for path in cache_folder.rglob("*.kernels"))
    assert len(files) == 3
    again = exported.opens(hashes=True)
    again.session.encode_image(pixels())
    again.session.decode(normal(1, 20, 64))
    assert [one.compiled for one in again.package.kernels] == [0, 0, 0]
    assert sorted(path.name for path in tensorrt_kernels.folder().iterdir()) == files
    for path in cache_folder.rglob("*.kernels"):
        path.write_bytes(b"not what it was")
    assert len(exported.opens(hashes=True).package.kernels) == 3, "a damaged file is no error"
    bundle = exported.bundle(hashes=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert not tensorrt_kernels.forget(bundle, exported.plan)
    assert tensorrt_kernels.forget(bundle, exported.plan)
    assert not list(cache_folder.rglob("*.kernels"))
    del again


def test_one_profile_can_serve_prefill_and_decoding(exported: Exported) -> None:
    graphs = {
        name: dataclasses.replace(graph, profiles=graph.profiles[:1])
        for name, graph in exported.plan.graphs.items()
    }
    plan = dataclasses.replace(exported.plan, graphs=graphs)
    ours, eager = dataclasses.replace(exported, plan=plan).opens().session, exported.eager
    eager.reset()
    for step, new in enumerate((30, 1, 1, 5, 1)):
        embeds = normal(1, new, 64, seed=step)
        assert worst(ours.decode(embeds), eager.decode(embeds)) < CLOSE


def test_only_files_with_names_of_ours_are_removed_from_the_cache(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_kernels, "MOST_FILES", 2)
    folder = tensorrt_kernels.folder()
    folder.mkdir(parents=True)
    for name in ("mine.kernels", "photo.jpg"):
        (folder / name).write_text("mine")
        os.utime(folder / name, (0, 0))
    for number in range(4):
        path = folder / f"{number:032}-{number:016}.kernels"
        tensorrt_kernels._write(path, b"compiled")
        os.utime(path, (number + 1, number + 1))
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.startswith("0")] == ["mine.kernels", "photo.jpg"]
    assert f"{3:032}-{3:016}.kernels" in names
    assert len(names) == 4
