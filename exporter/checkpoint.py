"""A checkpoint folder, understood: sizes, weights, tokenizer, preprocessing, and what is odd in it.

The tensors are the configuration: sizes come from their names and shapes, and config.json is the
cross-check. Every problem is collected before one ExportError is raised; nothing is written.
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint_apple, checkpoint_huggingface
from .checkpoint_decoder import decoder_config, is_tied
from .checkpoint_sizes import compare, decoder_shape, projector_layers, tower_config
from .config import FastVLMConfig, preset
from .errors import ExportError
from .json_file import Section, read_json, read_json_if_there
from .model.fastvlm import FastVLM, build
from .preprocess import Preprocessing
from .prompt import IMAGE_TOKEN
from .random_weights import SCHEME, random_state
from .tensor_names import Layout, detect, rename
from .tokenizer import Tokenizer, collect_tokenizer
from .weight_files import Weights, hash_files, read_weights

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
LARGEST_CONTEXT = 2**20
SHOWN_PROBLEMS = 20
BUNDLED_FOLDER = Path(__file__).parent / "assets" / "fastvlm-digits"
RANDOM_RESOLUTION = 1024  # what the released models were trained for
RANDOM_CONTEXT = 8192
SUPPORTED_TYPES = {torch.float32, torch.float16, torch.bfloat16}
# What the hash of the source covers beside the weights: everything that changes the result.
HASHED_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A FastVLM with everything that an export needs to know about it.

    `name` is the folder's, or the preset's where the weights are random, and only for people.
    `resolution` is the image's side in pixels, `context` the most positions, `dtype` the stored
    types, `sha256` covers the files that were read, `notes` are findings worth a line each.
    `state` holds the stored tensors under FastVLM's names, mapped from the files.
    """

    name: str
    path: Path
    layout: Layout
    config: FastVLMConfig
    resolution: int
    context: int
    preprocessing: Preprocessing
    tokenizer: Tokenizer
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    sha256: str
    notes: tuple[str, ...]
    state: Mapping[str, Tensor] = field(repr=False)

    def model(self) -> FastVLM:
        """The model in float32 for inference, as stored: not reparameterized."""
        model = build(self.config)
        state = {name: tensor.float() for name, tensor in self.state.items()}
        for name in model.state_dict():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.zeros((), dtype=torch.long)
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()


@dataclass(frozen=True, kw_only=True)
class _Tensors:
    """The used tensors under FastVLM's names, and the sizes that they show."""

    state: dict[str, Tensor]
    layout: Layout
    config: FastVLMConfig


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder in Apple's or Hugging Face's layout; the folder's name is free.

    Raises ExportError with all problems at once.
    """
    folder = Path(path)
    _check_folder(folder)
    problems: list[str] = []
    notes: list[str] = []
    config = read_json(folder / "config.json", problems)
    weights = read_weights(folder, problems)
    tokenizer = collect_tokenizer(folder, problems)
    if weights is None or not weights.tensors or not config.values:
        raise _error(folder, problems)
    notes += weights.notes
    tensors = _understand(weights, config, problems, notes)
    if tensors is None:
        raise _error(folder, problems)
    _check_values(tensors.state, problems)
    images = _preprocessing(folder, config, tensors, notes)
    text = _text_section(config, tensors.layout)
    vocab_size = tensors.config.decoder.vocab_size
    ends = _eos_token_ids(folder, config, text, tokenizer, vocab_size)
    if tokenizer is not None:
        notes += _missing_markers(tokenizer, ends)
    image_token_id = _image_token_id(config, tokenizer, vocab_size, notes)
    context = _context(config, tensors.config.decoder.max_positions)
    if problems or tokenizer is None or images is None:
        raise _error(folder, problems)
    extra = [folder / name for name in HASHED_FILES if (folder / name).is_file()]
    return Checkpoint(
        name=folder.resolve().name,
        path=folder,
        layout=tensors.layout,
        config=tensors.config,
        resolution=images.resolution,
        context=context,
        preprocessing=images,
        tokenizer=tokenizer,
        image_token_id=image_token_id,
        eos_token_ids=ends,
        dtype=_stored_types(tensors.state),
        sha256=hash_files([*weights.files, *extra]),
        notes=tuple(notes),
        state=tensors.state,
    )


def bundled() -> Checkpoint:
    """The small trained model that comes with the package (see its README)."""
    return dataclasses.replace(load(BUNDLED_FOLDER), layout=Layout.BUNDLED)


def random(preset_name: str, seed: int) -> Checkpoint:
    """A released FastVLM's sizes with random weights, in Apple's released (inference) form.

    The tokenizer is the bundled model's: its ids are a part of the larger vocabulary.
    """
    config = preset(preset_name)
    small = bundled()
    recipe = f"random {preset_name} {seed} {SCHEME}".encode()
    return dataclasses.replace(
        small,
        name=preset_name,
        layout=Layout.RANDOM,
        config=config,
        resolution=RANDOM_RESOLUTION,
        context=min(RANDOM_CONTEXT, config.decoder.max_positions),
        preprocessing=dataclasses.replace(small.preprocessing, resolution=RANDOM_RESOLUTION),
        dtype="float32",
        sha256=hashlib.sha256(recipe).hexdigest(),
        notes=(f"random weights from seed {seed}: answers mean nothing",),
        state=random_state(config, seed),
    )


def _check_folder(folder: Path) -> None:
    hint = "Give the folder that holds config.json and model.safetensors: --checkpoint DIR"
    if not folder.exists():
        raise ExportError(f"There is no checkpoint folder {folder}.", hint)
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file, not a checkpoint folder.", hint)
    if not any(folder.iterdir()):
        raise ExportError(f"The checkpoint folder {folder} is empty.", hint)


def _error(folder: Path, problems: list[str]) -> ExportError:
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    lines = "\n".join(f"  - {problem}" for problem in shown)
    return ExportError(
        f"{folder} is not a FastVLM checkpoint that can be exported:\n{lines}",
        f"Mend the files, then look at the checkpoint: fastvlm-export inspect {folder}",
    )


def _text_section(config: Section, layout: Layout) -> Section:
    return config if layout is Layout.APPLE else config.section("text_config")


def _understand(
    weights: Weights, config: Section, problems: list[str], notes: list[str]
) -> _Tensors | None:
    """Rename the tensors, read the sizes from them, and compare both with config.json."""
    layout = detect(weights.tensors)
    if layout is None:
        kind = config.values.get("model_type")
        problems.append(
            f"there is no FastViTHD tower among the tensors (config.json's model_type is {kind!r})"
        )
        return None
    names, unknown = rename(weights.tensors, layout)
    if layout is Layout.APPLE and "model.image_newline" in unknown:
        unknown.remove("model.image_newline")
        notes.append("model.image_newline is for tiled images and is ignored")
    problems += [f"the tensor {name} has no place in FastVLM" for name in unknown]
    for new, count in Counter(names.values()).items():
        if count > 1:
            problems.append(f"several tensors are {new}")
    state = {new: weights.tensors[name] for name, new in names.items()}
    _check_types(state, problems)
    text = _text_section(config, layout)
    flag = bool(text.flag("tie_word_embeddings")) or bool(config.flag("tie_word_embeddings"))
    tied = is_tied(state, flag, problems, notes)
    if tied:
        state.pop("decoder.lm_head.weight", None)
    model_config = _model_config(state, layout, config, tied, notes)
    if model_config is None:
        return None
    if layout is Layout.HUGGINGFACE:
        _fill_projector_biases(state, config, notes)
    compare(model_config, {name: tuple(x.shape) for name, x in state.items()}, problems)
    return _Tensors(state=state, layout=layout, config=model_config)


def _model_config(
    state: Mapping[str, Tensor], layout: Layout, config: Section, tied: bool, notes: list[str]
) -> FastVLMConfig | None:
    problems = config.problems
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tower = tower_config(shapes, problems)
    layers = projector_layers(shapes, problems)
    shape = decoder_shape(shapes, problems)
    reader = checkpoint_apple if layout is Layout.APPLE else checkpoint_huggingface
    reader.check_model(config, tower, layers, notes)
    if shape is None:
        return None
    decoder = decoder_config(_text_section(config, layout), shape, tied, notes)
    if tower is None or layers is None or decoder is None:
        return None
    return FastVLMConfig(tower=tower, decoder=decoder, projector_layers=layers)


def _fill_projector_biases(state: dict[str, Tensor], config: Section, notes: list[str]) -> None:
    """A projector without biases is one whose biases are zero."""
    if config.flag("multimodal_projector_bias") is False:
        for index in (0, 2):
            weight = state.get(f"projector.{index}.weight")
            if weight is not None and weight.dim() == 2:
                state.setdefault(f"projector.{index}.bias", weight.new_zeros(weight.shape[0]))
        notes.append("the projector has no biases: zeros stand for them")


def _check_types(state: Mapping[str, Tensor], problems: list[str]) -> None:
    odd = {x.dtype: name for name, x in state.items() if x.dtype not in SUPPORTED_TYPES}
    for dtype, name in odd.items():
        kind = str(dtype).removeprefix("torch.")
        problems.append(
            f"the tensor {name} is stored as {kind}: only float32, float16 and bfloat16 weights "
            "can be exported, not quantized ones"
        )


def _check_values(state: Mapping[str, Tensor], problems: list[str]) -> None:
    """Every weight is finite, and every variance is one."""
    for name, tensor in state.items():
        if not tensor.numel() or tensor.dtype not in SUPPORTED_TYPES:
            continue
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            problems.append(f"the tensor {name} holds NaN or infinite values")
        elif name.endswith("running_var") and low < 0:
            problems.append(f"the tensor {name} holds variances below zero")


def _preprocessing(
    folder: Path, config: Section, tensors: _Tensors, notes: list[str]
) -> Preprocessing | None:
    if tensors.layout is Layout.HUGGINGFACE:
        stride = tensors.config.tower.stride
        return checkpoint_huggingface.read_preprocessing(folder, config, stride, notes)
    size = checkpoint_apple.resolution(config)
    return checkpoint_apple.preprocessing(config, size) if size else None


def _eos_token_ids(
    folder: Path, config: Section, text: Section, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[int, ...]:
    """What ends an answer: generation_config.json's ids, else config.json's, and the turn's end."""
    generation = read_json_if_there(folder, "generation_config.json", config.problems)
    ids: list[int] = []
    for section in (generation, config, text):
        if not ids and "eos_token_id" in section:
            given = section.values["eos_token_id"]
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, bool) or not isinstance(value, int):
                    section.complain("eos_token_id", "a token id or a list of them")
                elif not 0 <= value < vocab_size:
                    section.complain("eos_token_id", f"below the vocabulary's {vocab_size}")
                else:
                    ids.append(value)
    end = tokenizer.token_to_id(END_OF_TURN) if tokenizer else None
    return tuple(dict.fromkeys([*ids, *([end] if end is not None else [])]))


def _missing_markers(tokenizer: Tokenizer, ends: tuple[int, ...]) -> list[str]:
    notes = []
    if tokenizer.token_to_id(START_OF_TURN) is None:
        notes.append(f"the tokenizer has no {START_OF_TURN}, which the qwen_2 prompt is made of")
    if not ends:
        notes.append(f"nothing ends an answer: there is no eos_token_id and no {END_OF_TURN}")
    return notes


def _image_token_id(
    config: Section, tokenizer: Tokenizer | None, vocab_size: int, notes: list[str]
) -> int:
    """The id that stands for one image token in a prompt.

    LLaVA writes -200, which no embedding has: the tokenizer's `<image>` stands for it, or else the
    first id that the tokenizer does not use.
    """
    named = None
    if tokenizer is not None:
        named = tokenizer.token_to_id(IMAGE_TOKEN)
        if tokenizer.vocab_size > vocab_size:
            config.problems.append(
                f"the tokenizer has {tokenizer.vocab_size} ids, the embedding only {vocab_size}"
            )
    for key in ("image_token_id", "image_token_index"):
        stated = config.integer(key, low=-(2**31))
        if stated is not None and stated >= 0:
            if stated >= vocab_size:
                config.complain(key, f"below the vocabulary's {vocab_size}")
            if named not in (None, stated):
                config.complain(key, f"the tokenizer's id of {IMAGE_TOKEN}, {named}")
            return stated
    if tokenizer is None:
        return 0
    if named is None and tokenizer.vocab_size >= vocab_size:
        notes.append("the embedding has no spare row for an image token")
    return tokenizer.vocab_size if named is None else named


def _context(config: Section, max_positions: int) -> int:
    stated = config.integer("tokenizer_model_max_length", high=10**30)
    return min(stated or max_positions, max_positions, LARGEST_CONTEXT)


def _stored_types(state: Mapping[str, Tensor]) -> str:
    """The types of the tensors, the most used first: "bfloat16" or "bfloat16, float32"."""
    counts: Counter[str] = Counter()
    for tensor in state.values():
        counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return ", ".join(kind for kind, _ in counts.most_common())
