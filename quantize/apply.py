"""A recipe applied once, to the PyTorch graphs: what every target packs and is held to."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..exporter import graphs
from ..exporter.graphs import Graph
from ..exporter.model.decoder import CacheInputsDecoder
from ..exporter.model.fastvlm import FastVLM
from ..exporter.prompt import prompt_ids
from ..exporter.spec import ExportSpec
from . import fp8
from .calibration import Calibration, pixels
from .palettes import palettize, without
from .ranges import OpRange
from .recipes import Float, Method, Part, Recipe
from .retype import to_bfloat16
from .weights import LayerRecord, quantize_decoder

ANSWER_TOKENS = 8  # of the model's own greedy answer, so that calibration sees decoding, too
QUESTIONS = (
    "Describe this image.",
    "What is in this picture?",
    "Read the number.",
    "How many digits are there?",
    "What colour is the background?",
)

Say = Callable[[str], None]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a recipe did: each layer with integer weights, and what stayed in float32 under fp16.

    `kept` is graph -> operators, `calibration` image name -> SHA-256, both empty where not needed.
    """

    recipe: Recipe
    layers: tuple[LayerRecord, ...] = ()
    kept: Mapping[str, tuple[OpRange, ...]] = field(default_factory=dict)
    calibration_source: str = ""
    calibration: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest; the recipe has a place of its own there."""
        return {
            "calibration": {"source": self.calibration_source, "images": dict(self.calibration)},
            "float32_operators": {
                graph: [asdict(found) for found in kept] for graph, kept in self.kept.items()
            },
            "layers": [asdict(layer) for layer in self.layers],
        }


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The three graphs under a recipe, and the record of it."""

    programs: Mapping[str, ExportedProgram]
    record: Record


def needs_calibration(recipe: Recipe) -> bool:
    """Whether a recipe has to see images: static ranges, fp8's, GPTQ, or the range scan of fp16."""
    return (
        recipe.float_format is Float.FP16
        or recipe.ranged
        or any(p.bits and p.method is Method.GPTQ for p in recipe.precisions)
    )


def quantize(
    model: FastVLM, recipe: Recipe, spec: ExportSpec, calibration: Calibration | None, say: Say
) -> Quantized:
    """Trace a reparameterized model's graphs under a recipe. The model itself is not changed."""
    shown = [] if calibration is None else pixels(calibration, spec.preprocessing)
    model = same_weights(model)
    sequences: list[Tensor] = []
    if shown and _decoder_is_calibrated(recipe):
        sequences = decoder_inputs(model, shown, spec, say)
    layers: tuple[LayerRecord, ...] = ()
    rest = fp8.without(without(recipe))
    if any(p.bits for p in recipe.precisions):
        scales = fp8.input_scales(model, recipe, shown, sequences, say) if recipe.fp8 else {}
        layers = quantize_decoder(model.decoder, rest, sequences, say)
        layers += palettize(model, recipe, say)
        layers += fp8.replace_layers(model, recipe, scales, say)
    built = graphs.build(
        model,
        resolution=spec.preprocessing.resolution,
        context=spec.context,
        image_token_id=spec.image_token_id,
    )
    kept: dict[str, tuple[OpRange, ...]] = {}
    programs: dict[str, ExportedProgram] = {}
    for name, graph in built.items():
        say(name)
        if name == "vision" and _has_bits(rest, Part.VISION):
            graph = _vision(graph, rest, shown, say)  # noqa: PLW2901 - it stands for it
        if recipe.float_format is Float.FP16:
            batches = _batches(graph, shown, sequences, spec)
            programs[name], kept[name] = _half(graph, batches, recipe, say)
        elif recipe.float_format is Float.BF16:
            programs[name] = to_bfloat16(graph)
        else:
            programs[name] = graphs.export_program(graph)
    return Quantized(
        programs=programs,
        record=Record(
            recipe=recipe,
            layers=layers,
            kept=kept,
            calibration_source="" if calibration is None else calibration.source,
            calibration=(
                {} if calibration is None else {i.name: i.sha256 for i in calibration.images}
            ),
        ),
    )


def same_weights(module: Module) -> Module:
    """Modules of its own around the same tensors: layers can be replaced, nothing is copied."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def _has_bits(recipe: Recipe, part: Part) -> bool:
    """Whether the part, or a rule that may reach into it, asks for integers."""
    return bool(getattr(recipe, part).bits) or any(rule.precision.bits for rule in recipe.layers)


def _decoder_is_calibrated(recipe: Recipe) -> bool:
    return (
        recipe.float_format is Float.FP16
        or recipe.fp8
        or any(p.bits and p.method is Method.GPTQ for p in recipe.precisions)
    )


def _vision(graph: Graph, recipe: Recipe, shown: Sequence[Tensor], say: Say) -> Graph:
    from .activations import integer_vision  # noqa: PLC0415 - imports torchao

    return integer_vision(graph, recipe, shown, say)


def _half(
    graph: Graph, batches: Sequence[tuple[Tensor, ...]], recipe: Recipe, say: Say
) -> tuple[ExportedProgram, tuple[OpRange, ...]]:
    from .half import to_half  # noqa: PLC0415 - only where it is needed

    half = to_half(graph, batches, recipe.range_limit, say)
    return half.program, half.kept


def _batches(
    graph: Graph, shown: Sequence[Tensor], sequences: Sequence[Tensor], spec: ExportSpec
) -> list[tuple[Tensor, ...]]:
    """Calibration inputs of one graph, in the order of its arguments."""
    if graph.name == "vision":
        return [(image,) for image in shown]
    if graph.name == "embedding":
        return [(torch.arange(spec.decoder.vocab_size)[None],)]
    return [(x, *_no_past(x, spec)) for x in sequences]


def _no_past(x: Tensor, spec: ExportSpec) -> list[Tensor]:
    config = spec.decoder
    past = torch.zeros(1, config.kv_heads, 0, config.head_dim)
    return [torch.ones(1, x.shape[1], dtype=torch.int64), *[past] * (2 * config.layers)]


@torch.no_grad()
def decoder_inputs(
    model: FastVLM, shown: Sequence[Tensor], spec: ExportSpec, say: Say
) -> list[Tensor]:
    """Inputs of the decoder, [1,S,D] an image: a question about it, the beginning of an answer."""
    decoder = CacheInputsDecoder(model.decoder, spec.context).eval()
    found = []
    for number, (image, question) in enumerate(zip(shown, itertools.cycle(QUESTIONS)), 1):
        say(f"calibration prompt {number} of {len(shown)}")
        ids = torch.tensor(
            [prompt_ids(spec.tokenizer, question, spec.image_token_id, spec.image_tokens)]
        )
        places = ids[0] == spec.image_token_id
        x = model.embed(ids.masked_fill(places, 0))
        x[:, places] = model.encode_image(image)
        parts, (mask, *past) = [x], _no_past(x, spec)
        for _ in range(ANSWER_TOKENS):
            logits, *past = decoder(parts[-1], mask, *past)
            parts.append(model.embed(logits[:, -1:].argmax(-1)))
            mask = torch.ones(1, mask.shape[1] + 1, dtype=torch.int64)
        found.append(torch.cat(parts, dim=1))
    return found
