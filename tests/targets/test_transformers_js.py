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
from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import onnx
from fastvlm_export.targets.base import Session
from fastvlm_export.targets.eager import EagerSession
from fastvlm_export.targets.generation import PromptInputs, generate

from .conftest import byte_tokenizer, export, lively_model, make_spec

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


def check_client(
    node: str, exported: Any, reference: Session, images: list[Path]
) -> list[list[int]]:
    """The client's prompt, pixels and greedy tokens are the reference's; returns the tokens."""
    spec = exported.spec
    outcome = run_client(node, exported.folder, images)
    assert outcome["prompt"] == qwen_2_prompt(QUESTION)

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


def random_images(exported: Any, folder: Path) -> list[Path]:
    """At the model's own size: the client's bicubic is not PIL's, so only then are pixels equal."""
    size = exported.spec.preprocessing.resolution
    images = []
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((size, size), Image.Resampling.NEAREST)
        images.append(folder / f"{seed}.png")
        image.save(images[-1])
    return images


def check_answers_differ(generated: list[list[int]], different: int) -> None:
    assert len({tuple(tokens) for tokens in generated}) >= different, "the image must matter"
    assert max(len(set(tokens)) for tokens in generated) > 4, "a constant answer proves nothing"


@pytest.mark.parametrize("which", ["small", "tied"])
def test_greedy_tokens_are_pytorchs(
    which: str, node: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exported = request.getfixturevalue(which)
    reference = EagerSession(exported.model, exported.spec.context)
    images = random_images(exported, tmp_path)
    check_answers_differ(check_client(node, exported, reference, images), len(images))


@pytest.mark.parametrize("head_dim", [20, 24])
def test_greedy_tokens_are_pytorchs_whatever_the_heads(
    head_dim: int, node: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Heads that ONNX Runtime's fused operator does not take, and heads that it does not rotate."""
    model = lively_model(byte_tokenizer().vocab_size, tied=False, layers=2, head_dim=head_dim)
    name, recipe = f"small-heads-{head_dim}", RECIPES["fp32"]
    exported = export(tmp_path_factory, name, model, make_spec(model), recipe)
    reference = EagerSession(model, exported.spec.context)
    images = random_images(exported, tmp_path)
    check_answers_differ(check_client(node, exported, reference, images), len(images))


def test_quantized_greedy_tokens_are_our_own_sessions(
    node: str, quantized: Any, tmp_path: Path
) -> None:
    """Ours is held to PyTorch elsewhere; here both must read one folder, named by its suffix."""
    reference = onnx.open(quantized.bundle)
    images = random_images(quantized, tmp_path)
    # Two images may look alike to a random model whose features are rounded.
    check_answers_differ(check_client(node, quantized, reference, images), 2)


def numbers_read(node: str, exported: Any, reference: Session) -> tuple[list[str], list[str]]:
    """What the client reads on the images in the package, and what is on them."""
    folder = Path(str(resources.files("fastvlm_export.exporter"))) / "assets" / "images"
    images = sorted(folder.glob("*.png"))
    assert images
    generated = check_client(node, exported, reference, images)
    # The files are named after what is on them: "green-425.png".
    shown = [path.stem.split("-")[1] for path in images]
    return [exported.spec.tokenizer.decode(tokens) for tokens in generated], shown


def test_the_bundled_model_reads_numbers_in_the_client(node: str, bundled: Any) -> None:
    read, shown = numbers_read(node, bundled, EagerSession(bundled.model, bundled.spec.context))
    assert read == shown


def test_the_bundled_model_reads_numbers_under_each_recipe(
    node: str, bundled_quantized: Any
) -> None:
    read, shown = numbers_read(node, bundled_quantized, onnx.open(bundled_quantized.bundle))
    assert read == shown
