"""The exported folder in Transformers.js under Node, through its own processor and generate."""

import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvlm_export.exporter.preprocess import preprocess, read_image
from fastvlm_export.exporter.prompt import prompt_ids, qwen_2_prompt
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.generation import PromptInputs, generate

CLIENT = Path(__file__).parent / "transformers_js"
QUESTION = "Read the number."
NEW_TOKENS = 24


@pytest.fixture(scope="session")
def node() -> str:
    """The path of Node, with Transformers.js installed beside the script; skips without."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if not found or not npm:
        pytest.skip("Node.js is missing: install node (20 or later) and npm")
    wanted = json.loads((CLIENT / "package.json").read_text())["dependencies"]
    package = CLIENT / "node_modules" / "@huggingface" / "transformers" / "package.json"
    if not package.exists() or json.loads(package.read_text())["version"] not in wanted.values():
        # The package holds the CPU library; install scripts would only fetch others.
        arguments = ["install", "--ignore-scripts", "--no-package-lock", "--no-audit", "--no-fund"]
        done = subprocess.run(
            [npm, *arguments], cwd=CLIENT, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            pytest.skip(f"Transformers.js is missing: npm install failed: {done.stderr[-300:]}")
    return found


def run_client(node: str, folder: Path, images: list[Path]) -> dict[str, Any]:
    command = [node, "generate.mjs", str(folder), str(NEW_TOKENS), QUESTION, *map(str, images)]
    done = subprocess.run(
        command, cwd=CLIENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check_client(node: str, exported: Any, images: list[Path]) -> list[list[int]]:
    """The client's prompt, pixels and greedy tokens are PyTorch's; returns the tokens."""
    spec = exported.spec
    outcome = run_client(node, exported.folder, images)
    assert outcome["prompt"] == qwen_2_prompt(QUESTION)

    reference = EagerSession(exported.model, spec.context)
    expected_ids = prompt_ids(spec.tokenizer, QUESTION, spec.image_token_id, spec.image_tokens)
    generated = []
    for path, answer in zip(images, outcome["answers"], strict=True):
        pixels = preprocess(read_image(path), spec.preprocessing)
        worst = np.abs(np.array(answer["pixels"]).reshape(pixels.shape) - pixels).max()
        assert worst < 1e-6
        assert answer["input_ids"] == expected_ids
        inputs = PromptInputs(
            input_ids=expected_ids, image_token_id=spec.image_token_id, pixels=pixels
        )
        expected = generate(
            reference, inputs, max_new_tokens=NEW_TOKENS, eos_token_ids=spec.eos_token_ids
        )
        generated.append(expected)
        # This client leaves the end token in.
        assert [i for i in answer["new_ids"] if i not in spec.eos_token_ids] == expected
    return generated


@pytest.mark.parametrize("which", ["small", "tied"])
def test_greedy_tokens_are_pytorchs(
    which: str, node: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exported = request.getfixturevalue(which)
    size = exported.spec.preprocessing.resolution
    images = []
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        # At the model's own size: the client's bicubic is not PIL's, so only then are pixels equal.
        image = Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST)
        images.append(tmp_path / f"{seed}.png")
        image.save(images[-1])
    generated = check_client(node, exported, images)
    assert len({tuple(tokens) for tokens in generated}) == len(images), "the image must matter"
    assert max(len(set(tokens)) for tokens in generated) > 4, "a constant answer proves nothing"


def test_the_bundled_model_reads_numbers_in_the_client(node: str, bundled) -> None:
    """Through the client, the trained model reads the digits of the images in the package."""
    folder = Path(str(resources.files("fastvlm_export.exporter"))) / "assets" / "images"
    images = sorted(folder.glob("*.png"))
    assert images
    read = [bundled.spec.tokenizer.decode(t) for t in check_client(node, bundled, images)]
    # The files are named after what is on them: "green-425.png".
    assert read == [path.stem.split("-")[1] for path in images]
