"""ExecuTorch's own `MultimodalRunner`, given the bundle's files, answers as our session does."""

import dataclasses
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from fastvlm_export.exporter import samples
from fastvlm_export.exporter.bundle import Bundle, open_bundle
from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.preprocess import preprocess
from fastvlm_export.exporter.prompt import IMAGE_TOKEN, prompt_ids, qwen_2_prompt
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.targets import executorch_file
from fastvlm_export.targets.executorch_flatbuffer import read_table
from fastvlm_export.targets.executorch_model import PROGRAM
from fastvlm_export.targets.executorch_proof import EXPENDABLE
from fastvlm_export.targets.executorch_session import ExecuTorchSession
from fastvlm_export.targets.generation import PromptInputs, generate
from fastvlm_export.validate import accuracy, digits
from fastvlm_export.validate.stock_runner import answers

TOKENS, QUESTIONS = 64, 90
END = 2**31 - 1  # an id that no vocabulary has


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("fp32", marks=pytest.mark.e2e),
        pytest.param("int4", marks=pytest.mark.e2e),
        pytest.param("int8", marks=pytest.mark.slow),
    ],
)
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(f"executorch_{request.param}"))


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> ExecuTorchSession:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXPENDABLE, "1")  # the export has run this very program in its own process
        return ExecuTorchSession(bundle)


@pytest.fixture(scope="module")
def endless(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle, whose program names an end token that never comes.

    Its answers are a few letters long; like this they go on to 64 tokens.
    """
    folder = tmp_path_factory.mktemp("endless")
    (folder / PROGRAM).write_bytes(_endless((bundle.path / PROGRAM).read_bytes()))
    shutil.copy(bundle.path / "tokenizer.json", folder)
    return dataclasses.replace(bundle, path=folder)


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
    manifest, tokenizer = bundle.manifest, read_tokenizer(bundle.path)
    found = []
    for sample in samples.samples([])[:3]:
        ids = prompt_ids(tokenizer, sample.question, manifest.image_token_id, manifest.image_tokens)
        found.append((sample.question, preprocess(sample.image, manifest.preprocessing), ids))
    return found


def in_words(question: str, pixels: Any) -> list[Any]:
    """A prompt that the runner tokenizes."""
    first, second = qwen_2_prompt(question).split(IMAGE_TOKEN)
    return [first, pixels, second]


def test_the_runner_says_the_same_64_tokens(
    endless: Bundle,
    session: ExecuTorchSession,
    asked: list[tuple[str, Any, list[int]]],
    record_property: Any,
) -> None:
    manifest, tokenizer = endless.manifest, read_tokenizer(endless.path)
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
        as_text.append(in_words(question, pixels))
    found = answers(endless, [*as_ids, *as_text], max_new_tokens=TOKENS, repeats=2)
    assert [one.pieces for one in found] == [*ours, *ours]
    for (_, _, ids), answer in zip([*asked, *asked], found, strict=True):
        assert answer.stats.prompt_tokens == len(ids)
        assert answer.stats.generated_tokens == TOKENS - 1
    least = min(run.ttft for one in found for run in one.stats.runs)
    assert 0 < least < 100 * min(seconds)  # seconds, and of the same work
    record_property("ttft_ms", f"ours {min(seconds) * 1e3:.1f}, runner {least * 1e3:.1f}")
    print(f"TTFT: ours {min(seconds) * 1e3:.1f} ms, MultimodalRunner {least * 1e3:.1f} ms")


def test_the_runner_answers_the_bundled_task_as_we_do(
    bundle: Bundle, session: ExecuTorchSession
) -> None:
    """The bundle as it is, ended by the program's own end tokens."""
    manifest, questions = bundle.manifest, digits.evaluation_set(QUESTIONS)
    ours = accuracy.evaluate(
        session,
        questions,
        tokenizer=read_tokenizer(bundle.path),
        preprocessing=manifest.preprocessing,
        image_token_id=manifest.image_token_id,
        image_tokens=manifest.image_tokens,
        eos_token_ids=manifest.eos_token_ids,
    )
    prompts = [in_words(q.text, preprocess(q.image, manifest.preprocessing)) for q in questions]
    found = answers(bundle, prompts, max_new_tokens=accuracy.MAX_NEW_TOKENS)
    assert {one.pieces[-1] for one in found} == {"<|im_end|>"}
    assert ["".join(one.pieces[:-1]) for one in found] == [one.got for one in ours.samples]
    assert ours.total.value >= 0.95


@pytest.mark.parametrize("bundle", [pytest.param("fp32", marks=pytest.mark.e2e)], indirect=True)
def test_a_damaged_bundle_ends_the_runner_not_us(bundle: Bundle, tmp_path: Path) -> None:
    content = (bundle.path / PROGRAM).read_bytes()
    (tmp_path / PROGRAM).write_bytes(content[: len(content) // 2])
    (tmp_path / "tokenizer.json").write_bytes((bundle.path / "tokenizer.json").read_bytes())
    damaged = dataclasses.replace(bundle, path=tmp_path)
    with pytest.raises(ExportError, match="MultimodalRunner ended"):
        answers(damaged, [[[1, 2]]], max_new_tokens=1)
