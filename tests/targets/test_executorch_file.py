"""Reading programs: what is in them, and that no damage gets past the one kind of error."""

import random
import struct
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from executorch.extension.pybindings import _C as runtime  # noqa: N811 - a module

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.targets import (
    executorch_file,
    executorch_flatbuffer,
    executorch_pack,
    executorch_xnn,
)
from fastvlm_export.targets.executorch_contents import Contents
from fastvlm_export.targets.executorch_layout import named_weights

from .executorch_toys import CONTEXT, ROWS, WIDTH, WORDS, Toy


def test_methods_constants_delegates_and_buffers_are_there(toy: Toy) -> None:
    file = executorch_file.read(toy.program)
    assert list(file.methods) == ["text_decoder", "token_embedding", "vision_encoder"]
    assert file.constant_methods["get_max_seq_len"] == (CONTEXT,)
    assert file.constant_methods["get_eos_ids"] == (3, 4)
    assert file.constant_methods["modality"] == ("vision",)
    assert file.backends == ("XnnpackBackend",)
    decoder, embedding = file.methods["text_decoder"], file.methods["token_embedding"]
    assert [one.shape for one in decoder.inputs] == [
        f"float32[<=1,<={CONTEXT},<={WIDTH}]",
        f"int64[<={CONTEXT}]",
    ]
    assert [one.shape for one in decoder.outputs] == [f"float32[1,1,{WORDS}]"]
    assert [one.sizes for one in decoder.buffers] == [(CONTEXT, WIDTH)]
    assert "aten::index_put_" in "".join(decoder.kernels) or "aten::copy_" in decoder.kernels
    assert embedding.kernels == ("aten::embedding.out",)
    (table,) = (one for one in embedding.constants if one.sizes == (WORDS, WIDTH))
    assert table.data is not None
    expected = toy.modules["token_embedding"].table
    assert np.array_equal(
        np.frombuffer(table.data, np.float32).reshape(WORDS, WIDTH), expected.numpy()
    )
    vision = file.methods["vision_encoder"]
    assert vision.kernels == () and vision.outputs[0].sizes == (1, ROWS, WIDTH)


def test_xnnpack_graphs_come_with_their_constants(toy: Toy) -> None:
    file = executorch_file.read(toy.program)
    (delegate,) = file.methods["vision_encoder"].delegates
    graph = executorch_xnn.xnn_graph(delegate)
    (conv,) = (
        one.xnode_union for one in graph.xnodes if type(one.xnode_union).__name__ == "XNNConv2d"
    )
    values = {value.id_out: value for value in (entry.xvalue_union for entry in graph.xvalues)}
    stored = executorch_xnn.xnn_constant(
        delegate, graph, values[conv.filter_id].constant_buffer_idx
    )
    weight = toy.modules["vision_encoder"].patches.weight.permute(0, 2, 3, 1).contiguous()
    assert bytes(stored) == weight.numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" * 40, "is not an ExecuTorch program"),
        (b"\x00\x00\x00\x00ET12", "damaged"),
        (b"\x08\x00\x00\x00ET12eh00" + b"\xff" * 60, "truncated"),
    ],
)
def test_what_is_no_program_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=words) as raised:
        executorch_file.read(path)
    assert "fastvlm-export" in raised.value.hint


def test_every_cut_program_is_refused(toy: Toy) -> None:
    content = toy.program.read_bytes()
    for size in range(0, len(content), 97):
        with pytest.raises(ExportError):
            executorch_file.parse(memoryview(content[:size]), "model.pte")


def _mutated(content: bytes, parts: list[range], seed: int) -> bytes:
    """Some bits or words of one of the parts are others."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 4))):
        at = draw.choice(parts[seed % len(parts)])
        if draw.random() < 0.5:
            changed[at] ^= 1 << draw.randrange(8)
        else:
            word = draw.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, draw.randrange(1 << 16)))
            changed[at : at + 4] = struct.pack("<I", word)
    return bytes(changed)


def test_damage_raises_one_error_or_reads_as_another_program(toy: Toy) -> None:
    content = toy.program.read_bytes()
    limit = executorch_file.read(toy.program).program_bytes
    graph = content.index(b"XH00")  # XNNPACK's, behind the program
    start, size = struct.unpack_from("<II", content, graph + 6)
    parts = [range(8, limit - 4), range(graph - 4, graph - 4 + start + size)]
    refused = 0
    for seed in range(700):
        try:
            file = executorch_file.parse(memoryview(_mutated(content, parts, seed)), "model.pte")
            for method in file.methods.values():
                for delegate in method.delegates:
                    executorch_xnn.xnn_table(delegate)
                Contents(method)
        except ExportError:
            refused += 1
    assert refused > 300


def test_parts_that_lie_over_each_other_are_not_read_again_and_again() -> None:
    # Every entry of a vector is the same table, with a vector of its own: read as often as it is
    # named, such a file of kilobytes takes gigabytes.
    schema = executorch_flatbuffer.parse_schema(
        "table Leaf { numbers: [long]; } table Root { leaves: [Leaf]; }"
    )
    builder = flatbuffers.Builder()
    numbers = builder.CreateNumpyVector(np.arange(100, dtype=np.int64))
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, numbers, 0)
    leaf = builder.EndObject()
    builder.StartVector(4, 1000, 4)
    for _ in range(1000):
        builder.PrependUOffsetTRelative(leaf)
    leaves = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, leaves, 0)
    builder.Finish(builder.EndObject())
    data = bytes(builder.Output())
    with pytest.raises(executorch_flatbuffer.DamagedError, match="over each other"):
        executorch_flatbuffer.read_table(memoryview(data), schema, "Root")


def test_a_tied_table_is_stored_once_and_computes_the_same(toy: Toy, tmp_path: Path) -> None:
    shared = executorch_pack.share(toy.unshared)
    table = WORDS * WIDTH * 4
    assert table <= len(toy.unshared) - len(shared) < table + 256
    assert executorch_pack.share(shared) == shared
    before, after = (
        executorch_file.parse(memoryview(one), "model.pte") for one in (toy.unshared, shared)
    )
    assert {key: bytes(data) for key, data in before.named.items()} == {
        key: bytes(data) for key, data in after.named.items()
    }
    path = tmp_path / "model.pte"
    outputs = []
    for content in (toy.unshared, shared):
        path.write_bytes(content)
        outputs.append(_outputs(str(path), None))
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


def test_large_weights_go_to_a_file_of_their_own_each_once(toy: Toy, tmp_path: Path) -> None:
    pte, ptd = toy.external
    table = WORDS * WIDTH * 4
    program, weights = tmp_path / "model.pte", tmp_path / "model.ptd"
    program.write_bytes(pte)
    weights.write_bytes(ptd)
    with pytest.raises(ExportError, match="weight file"):
        executorch_file.read(program)
    file = executorch_file.read(program, weights)
    (stored,) = (one for one in file.methods["token_embedding"].constants if len(one.sizes) == 2)
    assert stored.data is not None and len(stored.data) == table
    sizes = [len(data) for data in named_weights(memoryview(ptd), "model.ptd").values()]
    assert sizes.count(table) == 2  # the gather's name and XNNPACK's
    assert len(ptd) < sum(sizes)
    with pytest.raises(ExportError, match="not an ExecuTorch weight file"):
        executorch_file.read(program, program)
    program_alone = tmp_path / "whole.pte"
    program_alone.write_bytes(toy.unshared)
    for first, second in zip(
        _outputs(str(program), str(weights)), _outputs(str(program_alone), None), strict=True
    ):
        assert torch.equal(first, second)


def _outputs(program: str, weights: str | None) -> list[torch.Tensor]:
    """An image, some ids, a prefill and a step."""
    loaded = runtime._load_program(program, data_path=weights)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 16, 16, generator=draw)
    embeds = torch.randn(1, 5, WIDTH, generator=draw)
    decoder: Any = loaded.load_method("text_decoder")
    return [
        loaded.load_method("vision_encoder").call([pixels])[0],
        loaded.load_method("token_embedding").call([torch.tensor([[1, 2, WORDS - 1]])])[0],
        decoder.call([embeds, torch.arange(5)])[0],
        decoder.call([embeds[:, :1], torch.tensor([5])])[0],
    ]
