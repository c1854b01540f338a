"""ExecuTorch's own `MultimodalRunner`, given the bundle's files, answers as our session does."""

import dataclasses
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter import checkpoint as checkpoints
from fastvlm_export.exporter import samples
from fastvlm_export.exporter.bundle import Bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.prompt import IMAGE_TOKEN, prompt_ids, qwen_2_prompt
from fastvlm_export.targets import executorch_file
from fastvlm_export.targets.executorch_flatbuffer import read_table
from fastvlm_export.targets.executorch_session import ExecuTorchSession
from fastvlm_export.targets.generation import PromptInputs, generate
from fastvlm_export.validate.stock_runner import answers

TOKENS = 64
END = 2**31 - 1  # an id that no vocabulary has


@pytest.fixture(scope="module")
def bundle(executorch_bundled: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundled model in float32, whose program names an end token that never comes.

    Its answers are a few letters long; like this they go on to 64 tokens.
    """
    folder = tmp_path_factory.mktemp("endless")
    content = (executorch_bundled.path / "model.pte").read_bytes()
    (folder / "model.pte").write_bytes(_endless(content))
    shutil.copy(executorch_bundled.path / "tokenizer.json", folder)
    return dataclasses.replace(executorch_bundled, path=folder)


def _endless(content: bytes) -> bytes:
    size = executorch_file.parse(memoryview(content), "model.pte").program_bytes
    table = read_table(memoryview(content)[:size], executorch_file.program_schema(), "Program")
    changed = bytearray(content)
    for plan in table.execution_plan:
        if plan.name == "get_eos_ids":
            for index in plan.outputs:
                struct.pack_into("<q", changed, plan.values[index].val.places["int_val"], END)
    return bytes(changed)


@pytest.fixture(scope="module")
def asked(bundle: Bundle) -> list[tuple[str, Any, list[int]]]:
    """Question, pixels and prompt of three images of unlike answers."""
    manifest, tokenizer = bundle.manifest, checkpoints.bundled().tokenizer
    found = []
    for sample in samples.samples([])[:3]:
        ids = prompt_ids(tokenizer, sample.question, manifest.image_token_id, manifest.image_tokens)
        found.append((sample.question, preprocess(sample.image, manifest.preprocessing), ids))
    return found


def test_the_runner_says_the_same_64_tokens(
    bundle: Bundle, asked: list[tuple[str, Any, list[int]]], record_property: Any
) -> None:
    manifest, tokenizer = bundle.manifest, checkpoints.bundled().tokenizer
    session = ExecuTorchSession(bundle)
    ours, seconds = [], []
    for _, pixels, ids in asked:
        inputs = PromptInputs(input_ids=ids, image_token_id=manifest.image_token_id, pixels=pixels)
        for _ in range(4):
            begin = time.perf_counter()
            generate(session, inputs, max_new_tokens=1, eos_token_ids=())
            seconds.append(time.perf_counter() - begin)
        tokens = generate(session, inputs, max_new_tokens=TOKENS, eos_token_ids=())
        ours.append(tuple(tokenizer._inner.decode([t], skip_special_tokens=False) for t in tokens))
    assert len(set(ours)) > 1
    as_ids, as_text = [], []
    for question, pixels, ids in asked:
        before = ids.index(manifest.image_token_id)
        as_ids.append([ids[:before], pixels, ids[before + manifest.image_tokens :]])
        first, second = qwen_2_prompt(question).split(IMAGE_TOKEN)
        as_text.append([first, pixels, second])
    found = answers(bundle, [*as_ids, *as_text], max_new_tokens=TOKENS, repeats=2)
    assert [one.pieces for one in found] == [*ours, *ours]
    for (_, _, ids), answer in zip([*asked, *asked], found, strict=True):
        assert answer.stats.prompt_tokens == len(ids)
        assert answer.stats.generated_tokens == TOKENS - 1
    least = min(run.ttft for one in found for run in one.stats.runs)
    record_property("ttft_ms", f"ours {min(seconds) * 1e3:.1f}, runner {least * 1e3:.1f}")
    print(f"TTFT: ours {min(seconds) * 1e3:.1f} ms, MultimodalRunner {least * 1e3:.1f} ms")


def test_a_damaged_bundle_ends_the_runner_not_us(bundle: Bundle, tmp_path: Path) -> None:
    content = (bundle.path / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(content[: len(content) // 2])
    (tmp_path / "tokenizer.json").write_bytes((bundle.path / "tokenizer.json").read_bytes())
    damaged = dataclasses.replace(bundle, path=tmp_path)
    with pytest.raises(ExportError, match="MultimodalRunner ended"):
        answers(damaged, [[[1, 2]]], max_new_tokens=1)
