"""The folder that Apple's FastVLM app (iOS and macOS, MLX Swift around Core ML) opens.

`fastvithd.mlpackage` is the tower without projector: images float32 [1,3,R,R] -> image_features
float32 [1,N,features]. MLX computes the rest from `model.safetensors` (`apple_app_weights`) and
`config.json`. What the app itself brings, whatever the folder says:

- Preprocessing: it scales the shorter edge to R and crops the centre. A checkpoint that pads gets
  the same pixels for square images only; of others the app does not see the ends of the longer
  side. The manifest keeps the checkpoint's strategy, which our own runner and the proof use.
- Prompt: the image tokens come behind the question, not before it, and the chat template is the
  app's own. It counts floor(R / 64)^2 image tokens, so R has to be a multiple of 64.
- As released it demands features of [1,256,3072], so 1024 pixels and FastViTHD's full width: see
  `notes`. Its language model has biases on query, key and value, two projector layers with exact
  GELU between them, and heads that share the hidden size.
- It was built with mlx-swift-examples 2.21.2, whose configuration has one `quantization` for all
  layers, applied to those with `scales` in the weights; a missing or an unused tensor is an error.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..exporter.spec import ExportSpec
from ..quantize.recipes import HEAD, Recipe
from .apple_app_recipes import adapt, problems
from .base import Array, TokenIds
from .coreml_model import EXPORT_APP_HINT, FEATURES, MAIN, OpenModel

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from .apple_app_weights import Affine, Parts

LAYOUT = "apple-app"
PACKAGE = "fastvithd.mlpackage"
IMAGES = "images"
"""The package's input; its output is `image_features`."""

PATCH = 64
"""Pixels of an image token's side, as the app counts them."""

_RELEASED = (256, 3072)
_OF_WEIGHTS = ("tie_word_embeddings", "quantization")
"""What `config.json` says of the stored weights."""


def spec_problems(spec: ExportSpec) -> list[str]:
    """Every reason why the app could not run this model."""
    decoder, resolution = spec.decoder, spec.preprocessing.resolution
    found = []
    if spec.projector_layers != 2:
        found.append(f"The app's projector has 2 layers, this model's {spec.projector_layers}.")
    if decoder.heads * decoder.head_dim != decoder.hidden_size:
        found.append(
            f"The app divides the hidden size {decoder.hidden_size} by {decoder.heads} heads; this "
            f"model's have {decoder.head_dim} values each."
        )
    if (resolution // PATCH) ** 2 != spec.image_tokens:
        found.append(
            f"The app puts {(resolution // PATCH) ** 2} image tokens into the prompt, the tower "
            f"gives {spec.image_tokens} at {resolution} pixels: use a multiple of {PATCH}."
        )
    if spec.image_token_id >= decoder.vocab_size:
        found.append(
            f"The app looks the image token {spec.image_token_id} up, in an embedding table that "
            f"ends at {decoder.vocab_size - 1}."
        )
    return found


def notes(spec: ExportSpec) -> list[str]:
    """What a user has to change in the released app's source for this model; mostly nothing."""
    if (spec.image_tokens, spec.features) == _RELEASED:
        return []
    return [
        f"Apple's app as released demands image features of {list(_RELEASED)}; this model gives "
        f"{[spec.image_tokens, spec.features]}: change the two shapes in FastVLM.swift's `encode`."
    ]


def write(
    programs: Mapping[str, "ExportedProgram"], spec: ExportSpec, recipe: Recipe, out: Path
) -> None:
    """Write everything but the package below the folder `out`.

    The programs are the recipe's already: it says how many bits their integers have. Raises
    ExportError for a model that the app could not run, and for weights that MLX cannot store.
    """
    from . import apple_app_weights, client_files  # noqa: PLC0415 - imports torch

    found = spec_problems(spec)
    if found:
        raise ExportError("\n".join(found), "Leave --layout out: the default has no such limits.")
    modules = apple_app_weights.modules_of(programs)
    form = apple_app_weights.affine(modules, recipe)
    apple_app_weights.save(apple_app_weights.tensors(modules, form), out)
    client_files.write_json(_files(spec, modules, form), out)


def files(
    spec: ExportSpec,
    recipe: Recipe,
    programs: "Mapping[str, ExportedProgram] | None",
    folder: Path,
) -> dict[str, Any]:
    """Name -> content of the JSON files that `write` writes.

    Without programs, what `config.json` says of the stored weights is what it says in `folder`:
    the weights are opened by it.
    """
    from . import apple_app_weights  # noqa: PLC0415 - imports torch

    if programs is not None:
        modules = apple_app_weights.modules_of(programs)
        return _files(spec, modules, apple_app_weights.affine(modules, recipe))
    found = _files(spec, {}, None)
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {key: stated[key] for key in _OF_WEIGHTS if key in stated}
    return found | {"config.json": found["config.json"] | kept}


def _files(
    spec: ExportSpec, modules: "Mapping[str, Parts]", form: "Affine | None"
) -> dict[str, Any]:
    from . import client_files  # noqa: PLC0415 - as above

    tied = HEAD not in modules
    found = {**client_files.client_files(spec), "config.json": config(spec, tied=tied)}
    if form is not None:
        found["config.json"]["quantization"] = form.to_dict()
    found["tokenizer_config.json"]["added_tokens_decoder"] = _added(found["tokenizer.json"])
    return found


def config(spec: ExportSpec, *, tied: bool) -> dict[str, Any]:
    """`config.json` of a float model. `tied`: the head's weights are the embedding table's."""
    from . import client_files  # noqa: PLC0415 - as above

    return {
        **client_files.config(spec),
        "tie_word_embeddings": tied,
        "rope_traditional": False,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{spec.preprocessing.resolution}",
    }


def _added(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens by id, where checkpoints of the original code have them."""
    return {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in tokenizer["added_tokens"]
    }


class AppleAppSession:
    """The folder as the app runs it: the package, then what MLX computes, here in PyTorch.

    See `Session`, and `apple_app_model` for what MLX's half proves and what it leaves out. `exact`:
    embeddings are not rounded to float16; whoever passes `open_model` chooses for the package.
    """

    def __init__(self, bundle: Bundle, open_model: OpenModel, *, exact: bool = False) -> None:
        from .apple_app_model import open_rest  # noqa: PLC0415 - imports torch

        path = bundle.path / PACKAGE
        if not path.is_dir():
            raise ExportError(f"{bundle.path} has no {PACKAGE}.", EXPORT_APP_HINT)
        self.tower = open_model(path, MAIN)
        if set(self.tower.inputs) != {IMAGES}:
            given = ", ".join(sorted(self.tower.inputs)) or "nothing"
            raise ExportError(f"{path} takes {given}, not {IMAGES}.", EXPORT_APP_HINT)
        self.rest = open_rest(bundle.path, bundle.manifest.context, exact=exact)

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> [1,N,D]."""
        outputs = self.tower.predict({IMAGES: np.ascontiguousarray(pixels, dtype=np.float32)})
        if FEATURES not in outputs:
            given = ", ".join(sorted(outputs)) or "nothing"
            raise ExportError(f"{PACKAGE} gave {given}, not {FEATURES}.", EXPORT_APP_HINT)
        return self.rest.encode_image(np.asarray(outputs[FEATURES], dtype=np.float32))

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> [1,S,D]."""
        return self.rest.embed(input_ids)

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D] -> logits of the last position [1,V]."""
        return self.rest.decode(inputs_embeds)

    def reset(self) -> None:
        """Empty the cache."""
        self.rest.reset()


__all__ = [
    "LAYOUT",
    "PACKAGE",
    "AppleAppSession",
    "adapt",
    "config",
    "notes",
    "problems",
    "spec_problems",
    "write",
]
