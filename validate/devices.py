"""Time a bundle on a phone: push it beside a runner, run, read what the runner says.

What the runner gets and prints is examples/android's: pixels as raw float32, the prompt as token
ids; `PyTorchObserver` lines back. Preprocessing and tokenizing stay here, as they were proven.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..exporter.preprocess import preprocess
from ..exporter.prompt import IMAGE_TOKEN, prompt_ids, qwen_2_prompt
from ..exporter.samples import Sample
from ..exporter.scratch import ScratchFolder
from ..exporter.tokenizer import read_tokenizer
from ..targets.executorch_model import PROGRAM, WEIGHTS, Backend
from . import adb
from .adb import Adb, Output
from .device_latency import NAME, DeviceFacts, DeviceLatency, result
from .latency import Plan
from .runner_stats import MARK, RunnerStats, parse

RUNNER = "fastvlm_runner"
PIXELS, PROMPT, QUESTION = "pixels.f32", "prompt.ids", "question.json"
TOKENIZER = "tokenizer.json"
BUILD_HINT = "Build one for the device as examples/android/README.md says, and give --runner PATH."
IOS_HINT = "examples/ios/README.md"
LONGEST_RUN = 600.0  # seconds, for loading and all rounds

# ELF class and machine -> the name that Android has for it.
ABIS = {(2, 183): "arm64-v8a", (1, 40): "armeabi-v7a", (2, 62): "x86_64", (1, 3): "x86"}

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A folder that a runner or an app finds all it needs in."""

    folder: Path
    files: tuple[Path, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {"kit": self.folder.as_posix(), "files": [path.name for path in self.files]}


def run_on(
    url: str,
    bundle: Bundle,
    runner: Path | None,
    sample: Sample,
    plan: Plan | None = None,
    *,
    threads: int | None = None,
    timeout: float = LONGEST_RUN,
    say: Say = lambda _: None,
) -> DeviceLatency:
    """Time the bundle on the device of `url`; nothing stays on it.

    `threads` None: what ExecuTorch's thread pool chooses there. Raises ExportError for a device
    that is not to be had, a runner that is not one of its, and whatever goes wrong on it.
    """
    plan = plan or Plan()
    check_url(url)
    check_bundle(bundle)
    if bundle.manifest.artifact.get("backend") == Backend.COREML:
        raise ExportError(
            f"The bundle {bundle.path} is delegated to Core ML, which Android does not have.",
            "Export it for the phone: fastvlm-export --target executorch --backend xnnpack",
        )
    program = check_runner(runner)
    device = Adb.find(url)
    say(f"ask {device.serial} what it is")
    facts = device.facts()
    if any(facts.abis) and program not in facts.abis:
        raise ExportError(
            f"{runner} is built for {program}; {facts.serial} runs {', '.join(facts.abis)}.",
            BUILD_HINT,
        )
    with ScratchFolder() as folder:
        files = write_inputs(bundle, sample, plan, folder)
        files |= {name: bundle.path / name for name in _programs(bundle)}
        files[RUNNER] = Path(str(runner))
        _check_room(device, files)
        try:
            device.push(files, say)
            say("run")
            output = device.run(RUNNER, _arguments(bundle, plan, threads), timeout)
            facts = dataclasses.replace(facts, thermal_after=device.thermal_status())
        finally:
            device.remove(files)
    return _result(output, bundle, plan, facts, str(runner))


def from_log(path: Path, bundle: Bundle) -> DeviceLatency:
    """The runs in a log that a runner's output was saved to; the device is not known from it."""
    check_bundle(bundle)
    try:
        printed = path.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ExportError(
            f"The log {path} cannot be read: {error.strerror}.",
            f"Save what the runner prints to a file first: {IOS_HINT}",
        ) from error
    stats = parse(printed)
    first_text, text = _texts(stats, bundle)
    # What was asked is the log's; a prompt that the bundle's image does not fit in is not its own.
    if stats.prompt_tokens < bundle.manifest.image_tokens:
        raise ExportError(
            f"{path} is of prompts with {stats.prompt_tokens} tokens; this bundle's image alone "
            f"takes {bundle.manifest.image_tokens}.",
            "Give the bundle that was run, or run it with an image.",
        )
    return result(
        stats,
        setting=f"{bundle.manifest.recipe['name']}; read from {path.name}",
        load_note="as the runner says; whether the files were cached is not known",
        first_text=first_text,
        text=text,
    )


def write_kit(bundle: Bundle, sample: Sample, plan: Plan, folder: Path) -> Kit:
    """All that a runner or an app needs, for a device that is not on adb.

    Raises ExportError where the folder holds anything already.
    """
    check_bundle(bundle)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} is there already.", "Give --kit a folder that is not.")
    folder.mkdir(parents=True, exist_ok=True)
    written = list(write_inputs(bundle, sample, plan, folder).values())
    for name in (*_programs(bundle), TOKENIZER):
        shutil.copyfile(bundle.path / name, folder / name)
        written.append(folder / name)
    question = json.dumps(_question(bundle, sample, plan), indent=2) + "\n"
    (folder / QUESTION).write_text(question, "utf-8")
    written.append(folder / QUESTION)
    return Kit(folder=folder, files=tuple(written))


def write_inputs(bundle: Bundle, sample: Sample, plan: Plan, folder: Path) -> dict[str, Path]:
    """The question as a runner takes it, into `folder`; name -> file."""
    manifest = bundle.manifest
    tokenizer = read_tokenizer(bundle.path)
    ids = prompt_ids(tokenizer, sample.question, manifest.image_token_id, manifest.image_tokens)
    if len(ids) + plan.tokens > manifest.context:
        raise ExportError(
            f"The prompt's {len(ids)} tokens and {plan.tokens} new ones are more than the "
            f"context's {manifest.context}.",
            "Export again with a larger --context.",
        )
    pixels = preprocess(sample.image, manifest.preprocessing)
    pixels.astype(np.dtype("<f4")).tofile(folder / PIXELS)
    (folder / PROMPT).write_text(" ".join(map(str, ids)) + "\n", "ascii")
    return {name: folder / name for name in (PIXELS, PROMPT)}


def _question(bundle: Bundle, sample: Sample, plan: Plan) -> dict[str, object]:
    """The question to clients that tokenize it themselves: the texts around the image."""
    before, after = qwen_2_prompt(sample.question).split(IMAGE_TOKEN)
    return {
        "before": before,
        "after": after,
        "resolution": bundle.manifest.resolution,
        "maximumNewTokens": plan.tokens + 1,  # the first one is among them
        "warmup": plan.warmup,
        "runs": plan.runs,
    }


def _programs(bundle: Bundle) -> list[str]:
    """The program, and its weights where they are apart."""
    return [name for name in (PROGRAM, WEIGHTS) if name in bundle.manifest.files]


def check_url(url: str) -> None:
    """Raises ExportError for what is not adb://, with what there is for it."""
    if url.startswith(adb.SCHEME):
        return
    if url.lower().startswith(("ios", "apple")):
        raise ExportError(
            f"--device {url}: an iPhone runs no program of ours from outside.",
            f"Run the sample app ({IOS_HINT}), then: fastvlm-export bench BUNDLE --stats LOG",
        )
    raise ExportError(
        f"--device {url}: there is no such kind of device.",
        f"Use {adb.SCHEME}SERIAL, or {adb.SCHEME} for the only one; for a log that a runner "
        "printed: --stats LOG",
    )


def check_bundle(bundle: Bundle) -> None:
    """Raises ExportError for a bundle that ExecuTorch does not run."""
    if bundle.manifest.target != NAME or PROGRAM not in bundle.manifest.files:
        raise ExportError(
            f"A device runs bundles of target '{NAME}'; {bundle.path} is of target "
            f"'{bundle.manifest.target}'.",
            f"Export one: fastvlm-export --target {NAME} --out DIR",
        )


def check_runner(runner: Path | None) -> str:
    """The ABI that a runner is built for; ExportError for what is no program for Android."""
    if runner is None:
        raise ExportError("--device needs a runner to push.", BUILD_HINT)
    try:
        with runner.open("rb") as file:
            head = file.read(20)
    except OSError as error:
        raise ExportError(
            f"The runner {runner} cannot be read: {error.strerror}.", BUILD_HINT
        ) from error
    if head[:4] != b"\x7fELF" or len(head) < 20:
        raise ExportError(f"{runner} is no program for Android.", BUILD_HINT)
    machine = int.from_bytes(head[18:20], "little")
    found = ABIS.get((head[4], machine))
    if found is None:
        raise ExportError(
            f"{runner} is built for a machine that Android does not run on (ELF {machine}).",
            BUILD_HINT,
        )
    return found


def _check_room(device: Adb, files: Mapping[str, Path]) -> None:
    """Raises ExportError where the files do not fit."""
    needed = sum(file.stat().st_size for file in files.values())
    free = device.free_bytes()
    if free is not None and free < needed:
        raise ExportError(
            f"{device.serial} has {free / 1e6:.0f} MB free; the bundle and the runner take "
            f"{needed / 1e6:.0f} MB.",
            "Free some, or export a smaller bundle: fastvlm-export --target executorch "
            "--recipe int4",
        )


def _arguments(bundle: Bundle, plan: Plan, threads: int | None) -> list[str]:
    """The runner's command line; every path is relative to the remote folder."""
    options: dict[str, object] = {
        "--model": PROGRAM,
        "--image": PIXELS,
        "--prompt": PROMPT,
        "--image-token-id": bundle.manifest.image_token_id,
        "--new-tokens": plan.tokens,
        "--warmup": plan.warmup,
        "--runs": plan.runs,
    }
    if WEIGHTS in bundle.manifest.files:
        options["--data"] = WEIGHTS
    if threads:
        options["--threads"] = threads
    return [str(word) for pair in options.items() for word in pair]


def _result(
    output: Output, bundle: Bundle, plan: Plan, facts: DeviceFacts, runner: str
) -> DeviceLatency:
    """Read the runner's output; raises ExportError where it failed, or said less than asked."""
    if output.code:
        raise ExportError(
            f"{runner} failed on {facts.serial} with {adb.ending(output)}", _remedy(output)
        )
    if MARK not in output.stdout:
        raise ExportError(
            f"{runner} ended on {facts.serial} without a word about its runs: {adb.last(output)}",
            BUILD_HINT,
        )
    stats = parse(output.stdout)
    if len(stats.runs) != plan.runs:
        raise ExportError(
            f"{runner} was asked for {plan.runs} runs and told of {len(stats.runs)}.", BUILD_HINT
        )
    first_text, text = _texts(stats, bundle)
    return result(
        stats,
        setting=f"{bundle.manifest.recipe['name']}; {Path(runner).name} over adb",
        load_note="warm: the files had just been pushed",
        first_text=first_text,
        text=text,
        warmup=plan.warmup,
        device=facts,
    )


def _remedy(output: Output) -> str:
    """The next thing to do about a runner that failed."""
    said = output.stderr + output.stdout
    if output.code == 137:  # SIGKILL: Android's low memory killer
        return "It likely ran out of memory: export with --recipe int4, or a smaller --context."
    if output.code == 132:  # SIGILL
        return "It was built for a newer processor: build it for the device's own. " + BUILD_HINT
    if "LINK EXECUTABLE" in said:
        return "Link its C++ runtime statically (-DANDROID_STL=c++_static). " + BUILD_HINT
    return "See whether the bundle itself is sound: fastvlm-export validate BUNDLE. " + BUILD_HINT


def _texts(stats: RunnerStats, bundle: Bundle) -> tuple[str | None, str | None]:
    """The first token's text and the last run's answer; None where ids were not printed.

    A runner decodes as many tokens as it is told to; the answer ends where a client would stop.
    """
    tokens = stats.runs[-1].tokens
    if not tokens:
        return None, None
    tokenizer, ends = read_tokenizer(bundle.path), bundle.manifest.eos_token_ids
    answer = list(itertools.takewhile(lambda token: token not in ends, tokens))
    return tokenizer.decode(tokens[:1]), tokenizer.decode(answer)
