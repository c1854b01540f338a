"""Apple's folder, written and read back: the weights are the recipe's, bit for bit.

EXACT is float32 rounding of sums, against PyTorch running the same programs without rounding.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.export import ExportedProgram

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.exporter.model.fastvlm import FastVLM
from fastvlm_export.exporter.reparameterize import reparameterize
from fastvlm_export.exporter.spec import ExportSpec
from fastvlm_export.exporter.tokenizer import read_tokenizer
from fastvlm_export.quantize.apply import needs_calibration, quantize
from fastvlm_export.quantize.calibration import load as load_calibration
from fastvlm_export.quantize.recipes import RECIPES, LayerRule, Precision, Recipe
from fastvlm_export.targets import apple_app, apple_app_weights, coreml_recipes
from fastvlm_export.targets.apple_app_model import unpack
from fastvlm_export.targets.apple_app_weights import Affine, packed
from fastvlm_export.targets.eager import ProgramSession

from .conftest import CONTEXT, RESOLUTION, bundle_of, byte_tokenizer, lively_model, make_spec

EXACT = 1e-5
PADDING = 8  # rows of the table beyond the tokenizer's, one of them the image token's
SMALLEST = (1, 1, 1, 1, 1)  # of the tower, for which there is a stand-in
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])

NEEDED = {
    "model_type": str,
    "hidden_size": int,
    "num_hidden_layers": int,
    "intermediate_size": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "image_token_index": int,
    "mm_hidden_size": int,
}
"""Keys that the app's configuration decodes and cannot do without."""


class Tower:
    """A package that gives the same features for any image."""

    def __init__(self, features: NDArray[np.float32], name: str = apple_app.IMAGES) -> None:
        self.features, self.inputs = features, {name: (1, 3, RESOLUTION, RESOLUTION)}

    def make_state(self) -> None:
        return None

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], state: Any = None
    ) -> dict[str, NDArray[Any]]:
        assert {name: x.shape for name, x in inputs.items()} == self.inputs
        return {"image_features": self.features}


@dataclasses.dataclass(frozen=True, kw_only=True)
class App:
    """A folder as the app gets it, and what it was made of."""

    model: FastVLM
    spec: ExportSpec
    programs: Mapping[str, ExportedProgram]
    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text()))

    def session(
        self, folder: Path | None = None, *, exact: bool = True
    ) -> apple_app.AppleAppSession:
        tower = Tower(features(self.spec))
        bundle = bundle_of(folder or self.folder, CONTEXT)
        return apple_app.AppleAppSession(bundle, lambda package, function: tower, exact=exact)

    def reference(self) -> ProgramSession:
        return ProgramSession(self.programs, self.spec.decoder, CONTEXT, exact=True)


def features(spec: ExportSpec) -> NDArray[np.float32]:
    shape = (1, spec.image_tokens, spec.features)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def make_app(folder: Path, recipe: Recipe, *, tied: bool = True) -> App:
    vocabulary = byte_tokenizer().vocab_size + PADDING
    # Untied, weights in which one changed word is plain to see: the seed draws the tower first.
    raw = lively_model(vocabulary, tied=tied, depths=SMALLEST if tied else (1, 2, 1, 1, 1))
    model = reparameterize(raw).model
    spec = make_spec(model)
    calibration = load_calibration(None) if needs_calibration(recipe) else None
    programs = quantize(model, recipe, spec, calibration, lambda _: None).programs
    apple_app.write(programs, spec, recipe, folder)
    (folder / apple_app.PACKAGE).mkdir()
    return App(model=model, spec=spec, programs=programs, folder=folder)


def as_here(name: str) -> Recipe:
    return apple_app.adapt(coreml_recipes.adapt(RECIPES[name]))


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8", "int4"])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> App:
    return make_app(tmp_path_factory.mktemp(request.param), as_here(request.param))


@pytest.fixture(scope="session")
def int4(tmp_path_factory: pytest.TempPathFactory) -> App:
    """Untied, in float32 around the integers."""
    recipe = dataclasses.replace(RECIPES["fp32"], decoder=Precision(bits=4, group_size=32))
    return make_app(tmp_path_factory.mktemp("untied"), recipe, tied=False)


def worst(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_same(app: App, session: apple_app.AppleAppSession) -> None:
    """Embeddings, a prompt, a single token behind it, and again after a reset."""
    reference = app.reference()
    embeds = reference.embed(TOKENS)
    assert worst(session.embed(TOKENS), embeds) <= EXACT
    for _ in range(2):
        for part in (embeds, embeds[:, :1]):
            assert worst(session.decode(part), reference.decode(part)) <= EXACT
        session.reset()
        reference.reset()


def test_the_language_model_read_back_is_the_recipes(app: App) -> None:
    assert_same(app, app.session())


def test_embeddings_are_rounded_as_the_recipe_stores_them(app: App) -> None:
    reference = ProgramSession(app.programs, app.spec.decoder, CONTEXT)
    found = app.session(exact=False).embed(TOKENS)
    assert worst(found, reference.embed(TOKENS)) <= 1e-6


def test_features_go_through_the_stored_projector(app: App) -> None:
    session = app.session()
    found = session.encode_image(np.zeros((1, 3, RESOLUTION, RESOLUTION), dtype=np.float32))
    with torch.no_grad():
        projector = app.programs["vision"].state_dict["projector.0.weight"].dtype
        model = lively_projector(app.model, projector)
        expected = model(torch.from_numpy(features(app.spec))).numpy()
    assert worst(found, expected) <= EXACT


def lively_projector(model: FastVLM, dtype: torch.dtype) -> torch.nn.Module:
    """The model's projector with weights rounded to the type that they are stored in."""
    config = model.config
    rounded = FastVLM(config).projector
    rounded.load_state_dict(
        {name: x.to(dtype).float() for name, x in model.projector.state_dict().items()}
    )
    return rounded


def test_an_untied_head_and_the_table_stay_apart(int4: App) -> None:
    stored = load_file(int4.folder / "model.safetensors")
    assert int4.config["tie_word_embeddings"] is False
    assert "language_model.lm_head.weight" in stored
    assert int4.config["quantization"] == {"group_size": 32, "bits": 4}
    assert_same(int4, int4.session())


def test_a_tied_table_is_stored_once(app: App) -> None:
    names = set(load_file(app.folder / "model.safetensors"))
    assert app.config["tie_word_embeddings"] is True
    assert not any("lm_head" in name for name in names)


def test_a_head_of_other_integers_than_the_table_is_a_layer_of_its_own(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES["fp32"], head=Precision(bits=8))
    app = make_app(tmp_path, recipe)
    assert app.config["tie_word_embeddings"] is False
    assert_same(app, app.session())


def test_layers_of_fewer_bits_are_stored_with_the_most_bits_as_they_are(tmp_path: Path) -> None:
    rule = LayerRule(pattern="decoder.layers.0.*", precision=Precision(bits=8))
    recipe = dataclasses.replace(
        RECIPES["fp32"], decoder=Precision(bits=4, group_size=32), layers=(rule,)
    )
    app = make_app(tmp_path, recipe)
    assert app.config["quantization"] == {"group_size": 32, "bits": 8}
    assert_same(app, app.session())


def test_large_models_are_written_as_several_files(int4: App, tmp_path: Path) -> None:
    for path in int4.folder.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / apple_app.PACKAGE).mkdir()
    items = load_file(int4.folder / "model.safetensors").items()
    apple_app_weights.save(items, tmp_path, shard=50_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same(int4, int4.session(tmp_path))


def test_the_configuration_has_what_the_app_insists_on(app: App) -> None:
    config = app.config
    assert {key: type(config[key]) for key in NEEDED} == NEEDED
    assert config["model_type"] == "llava_qwen2"
    assert config["mm_hidden_size"] == app.spec.features
    assert config["image_token_index"] == app.spec.image_token_id
    assert "rope_scaling" not in config  # the app would demand a multimodal one
    assert config["eos_token_id"] == app.spec.eos_token_ids[0]


def test_only_integers_are_announced_as_quantized(app: App) -> None:
    stored = load_file(app.folder / "model.safetensors")
    integers = [name for name in stored if name.endswith(".scales")]
    assert bool(integers) == ("quantization" in app.config)
    with safe_open(app.folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_all_files_can_be_read_by_whoever_reads_one(app: App) -> None:
    files = [path for path in app.folder.iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o444 for path in files} == {0o444}


def test_the_processor_is_the_one_that_the_app_registers(app: App) -> None:
    found = json.loads((app.folder / "preprocessor_config.json").read_text())
    assert found["processor_class"] == "LlavaProcessor"
    assert found["size"] == {"shortest_edge": RESOLUTION}
    assert found["crop_size"] == {"width": RESOLUTION, "height": RESOLUTION}
    assert len(found["image_mean"]) == len(found["image_std"]) == 3
    side = (
        RESOLUTION // json.loads((app.folder / "processor_config.json").read_text())["patch_size"]
    )
    assert side**2 == app.spec.image_tokens


def test_the_image_token_is_one_token_of_the_folder(app: App) -> None:
    tokenizer = read_tokenizer(app.folder)
    assert tokenizer.encode("<image>") == [app.spec.image_token_id]
    config = json.loads((app.folder / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"]
    assert added[str(app.spec.image_token_id)]["content"] == "<image>"
    assert app.spec.image_token_id == max(map(int, added))
    assert tokenizer.token_to_id(config["eos_token"]) == app.spec.eos_token_ids[0]
    assert "<image>" in config["chat_template"]


def test_words_hold_the_first_value_in_their_lowest_bits() -> None:
    four = torch.arange(-8, 8, dtype=torch.int8).repeat(2)[None]
    scale = torch.tensor([[0.5]])
    parts = packed({"weight": four, "scale": scale}, Affine(group_size=32, bits=4))
    assert parts["weight"].tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert parts["scales"].tolist() == [[0.5]]
    assert parts["biases"].tolist() == [[-4.0]]
    eight = torch.tensor([[-128, -127, 0, 127] * 8], dtype=torch.int8)
    parts = packed({"weight": eight, "scale": scale}, Affine(group_size=32, bits=8))
    assert parts["weight"].tolist() == [[0xFF800100] * 8]
    assert parts["biases"].tolist() == [[-64.0]]


def test_scales_are_repeated_for_smaller_groups() -> None:
    weight, scale = torch.zeros(1, 128, dtype=torch.int8), torch.tensor([[1.0, 2.0]])
    parts = packed({"weight": weight, "scale": scale}, Affine(group_size=32, bits=8))
    assert parts["scales"].tolist() == [[1.0, 1.0, 2.0, 2.0]]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2**-8)])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_go_into_the_biases(bits: int, dtype: torch.dtype, limit: float) -> None:
    """w = q * scale + bias; errors in steps of the scale: a float16 bias is rounded."""
    torch.manual_seed(0)
    half = 2 ** (bits - 1)
    weight = torch.randint(-half, half, (64, 64), dtype=torch.int8)
    zeros = torch.randint(-half, half, (64, 2), dtype=torch.int8)
    scale = (torch.rand(64, 2) + 0.5).to(dtype)
    found = packed(
        {"weight": weight, "scale": scale, "zero_point": zeros}, Affine(group_size=32, bits=bits)
    )
    steps = weight.float() - zeros.float().repeat_interleave(32, 1)
    expected = steps * scale.float().repeat_interleave(32, 1)
    got = unpack(found["weight"], found["scales"], found["biases"], bits)
    error = ((got - expected) / scale.float().repeat_interleave(32, 1)).abs().max()
    assert error <= limit * 2**bits


def damaged(app: App, folder: Path, change: Any) -> Path:
    """A copy of the folder whose tensors `change` has changed in place."""
    for path in app.folder.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / apple_app.PACKAGE).mkdir()
    tensors = load_file(app.folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_one_error_names_all_that_is_wrong_with_the_weights(int4: App, tmp_path: Path) -> None:
    layer = "language_model.model.layers.0"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{layer}.mlp.up_proj.biases"]
        del tensors["language_model.model.norm.weight"]
        tensors["vision_tower.weight"] = torch.zeros(1)
        tensors["multi_modal_projector.linear_0.bias"] = torch.zeros(5)
        tensors[f"{layer}.mlp.gate_proj.weight"] = torch.zeros(96, 8, dtype=torch.int32)

    with pytest.raises(ExportError) as caught:
        int4.session(damaged(int4, tmp_path, change))
    for line in (
        f"{layer}.mlp.up_proj.biases is missing",
        "language_model.model.norm.weight is missing",
        "vision_tower.weight is in no layer of the model",
        "multi_modal_projector.linear_0.bias has shape [5], not [64]",
        f"{layer}.mlp.gate_proj.weight is int32, not uint32",
    ):
        assert line in caught.value.message
    assert "--layout apple-app" in caught.value.hint


def test_one_changed_word_changes_the_answer(int4: App, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        words = tensors["language_model.model.layers.2.mlp.down_proj.weight"].view(torch.int32)
        words[5, 3] ^= 0x7

    embeds = int4.reference().embed(TOKENS)
    found = int4.session(damaged(int4, tmp_path, change)).decode(embeds)
    assert worst(found, int4.reference().decode(embeds)) > 100 * EXACT


def test_a_truncated_file_is_one_error(int4: App, tmp_path: Path) -> None:
    folder = damaged(int4, tmp_path, lambda tensors: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"model\.safetensors is truncated or damaged"):
        int4.session(folder)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("image_token_index", None, "image_token_index is missing"),
        ("hidden_size", "64", 'hidden_size is "64", not a whole number'),
        ("num_hidden_layers", 2, "layers.2.input_layernorm.weight is in no layer of the model"),
        ("quantization", None, "q_proj.scales is in no layer of the model"),
        ("model_type", "qwen2", "the app knows no other"),
    ],
)
def test_a_configuration_of_another_model_is_one_error(
    int4: App, tmp_path: Path, key: str, value: Any, line: str
) -> None:
    folder = damaged(int4, tmp_path, lambda tensors: None)
    config = {**int4.config, key: value}
    config = {name: x for name, x in config.items() if x is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        int4.session(folder)
    shown = caught.value.message
    assert line in shown or " more." in shown


def test_a_folder_without_its_package_is_refused(int4: App, tmp_path: Path) -> None:
    folder = damaged(int4, tmp_path, lambda tensors: None)
    (folder / apple_app.PACKAGE).rmdir()
    with pytest.raises(ExportError, match=r"has no fastvithd\.mlpackage"):
        int4.session(folder)


def test_a_foreign_package_is_refused(int4: App) -> None:
    tower = Tower(features(int4.spec), name="pixel_values")
    bundle = bundle_of(int4.folder, CONTEXT)
    with pytest.raises(ExportError, match="takes pixel_values, not images"):
        apple_app.AppleAppSession(bundle, lambda package, function: tower)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"projector_layers": 1}, "projector has 2 layers, this model's 1"),
        ({"image_tokens": 9}, "puts 4 image tokens into the prompt, the tower gives 9"),
        ({"image_token_id": 10_000}, "an embedding table that ends at"),
    ],
)
def test_models_that_the_app_cannot_run_are_refused(
    int4: App, tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    spec = dataclasses.replace(int4.spec, **change)
    with pytest.raises(ExportError, match=line):
        apple_app.write(int4.programs, spec, RECIPES["fp32"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_sizes_than_the_released_ones_are_noted(int4: App) -> None:
    released = dataclasses.replace(int4.spec, image_tokens=256, features=3072)
    assert apple_app.notes(released) == []
    assert "[256, 3072]" in apple_app.notes(int4.spec)[0]
