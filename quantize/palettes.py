"""Palettization, Core ML's own recipe: weights as indices into lookup tables that k-means finds.

The layers are those which integers go into elsewhere: dense 1x1 convolutions and linear layers of
tower and projector but for squeeze-and-excite, all of the decoder's linear layers, the embedding,
the head. Depthwise convolutions and the stem's 3x3 hold next to no weights and stay float.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..exporter.errors import ExportError
from ..exporter.model.fastvithd import SqueezeExcite
from ..exporter.model.fastvlm import FastVLM
from . import recipes
from .kmeans import cluster
from .ops import lookup, palettized_embedding
from .recipe_layers import undivided
from .recipes import (
    EMBEDDING,
    HEAD,
    PALETTE_BITS,
    Activations,
    Precision,
    Recipe,
    ScaleFormat,
)
from .toml_file import shown
from .weights import LayerRecord

CHUNK = 2**24  # weights compared at once, for their error

_Layer = nn.Conv2d | nn.Linear | nn.Embedding


class _Palettized(nn.Module):
    indices: Tensor
    table: Tensor

    def __init__(self, indices: Tensor, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.register_buffer("table", table)

    def extra_repr(self) -> str:
        groups, entries = self.table.shape
        return f"{list(self.indices.shape)}, {groups} tables of {entries}"


class PaletteLinear(_Palettized):
    """x [...,K] @ `fastvlm::lookup`' + bias -> [...,N].

    Buffers: indices uint8 [N,K], table float [G,2^bits], bias float [N] or None.
    """

    bias: Tensor | None

    def __init__(self, indices: Tensor, table: Tensor, bias: Tensor | None) -> None:
        super().__init__(indices, table)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(x, lookup(self.indices, self.table), self.bias)


class PaletteConv2d(_Palettized):
    """The convolution `like` with weights from `fastvlm::lookup`: [B,I,H,W] -> [B,O,H',W'].

    Buffers: indices uint8 [O,I,h,w], table float [G,2^bits], bias float [O] or None.
    """

    bias: Tensor | None

    def __init__(self, indices: Tensor, table: Tensor, like: nn.Conv2d) -> None:
        super().__init__(indices, table)
        self.register_buffer("bias", None if like.bias is None else like.bias.detach())
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        weight = lookup(self.indices, self.table)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class PaletteEmbedding(_Palettized):
    """`fastvlm::palettized_embedding` with its table: ids [B,S] -> [B,S,D].

    Buffers: indices uint8 [V,D], table float [G,2^bits].
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = palettized_embedding(input_ids, self.indices, self.table)
        return out


def without(recipe: Recipe) -> Recipe:
    """The rest of the recipe: what it palettizes stays float."""
    return recipes.without(recipe, lambda precision: precision.palettized)


def layer_rows(model: FastVLM) -> dict[str, int]:
    """Output channels (a table: rows) of every layer that a recipe may palettize.

    In the order of the network, the tied head last; sizes are all that is read of the weights.
    """
    rows = {name: len(layer.weight) for name, layer in _layers(model)}
    return rows if HEAD in rows else {**rows, HEAD: rows[EMBEDDING]}


def problems(recipe: Recipe, rows: Mapping[str, int] | None) -> list[str]:
    """Every reason why the recipe's lookup tables can't be, naming the key in a recipe file.

    `rows`: layer name -> output channels, where the model is known (see `layer_rows`).
    """
    found: list[str] = []
    for key, _, precision in recipe.settings:
        if precision.palettized:
            found += [f"{key}.{line}" for line in _precision_problems(precision)]
    for key, size, count, names in undivided(recipe, rows or {}, lambda s: s.precision.palettized):
        found.append(
            f"{key}.group_size is {size}: it does not divide the {count} output channels of {names}"
        )
    return found


def _precision_problems(precision: Precision) -> Iterator[str]:
    if precision.bits not in PALETTE_BITS:
        sizes = ", ".join(map(str, PALETTE_BITS))
        yield f"bits is {precision.bits}: an index into a lookup table has one of {sizes}"
    if precision.activations is not Activations.FLOAT:
        yield f'activations is {shown(precision.activations)}: beside lookup tables only "float"'
    if precision.scale_format is not ScaleFormat.FLOAT:
        yield f"scale_format is {shown(precision.scale_format)}: lookup tables have no scales"
    if not precision.symmetric:
        yield "symmetric is false: lookup tables know nothing of it, leave it out"


@torch.no_grad()
def palettize(
    model: FastVLM, recipe: Recipe, say: Callable[[str], None] = lambda _: None
) -> tuple[LayerRecord, ...]:
    """Replace the layers that the recipe palettizes, in place, and say what each became.

    A reparameterized model, where layers with integers may stand already (`without` is their
    recipe). A tied table whose embedding and head are palettized alike is stored once, in both;
    else the head becomes a layer of its own. Raises ExportError with all `problems`.
    """
    if not recipe.palettized:
        return ()
    wrong = problems(recipe, layer_rows(model))
    if wrong:
        raise ExportError(
            "\n".join(wrong),
            "Change these keys: a group_size divides the output channels of each of its layers, or "
            'is "tensor" (one table for a layer); a rule of [[layers]] speaks about single layers.',
        )
    embedding, head = recipe.precision(EMBEDDING), recipe.precision(HEAD)
    tied = not hasattr(model.decoder, "lm_head")
    shared = tied and embedding.palettized and embedding == head
    if tied and not shared and (embedding.palettized or head.palettized):
        model.decoder.lm_head = _linear(model.decoder.embed_tokens.weight)
    records: list[LayerRecord] = []
    for name, layer in list(_layers(model)):
        precision = recipe.precision(name)
        if not precision.palettized:
            continue
        say(f"palettize {name}")
        indices, table, error = _tables(name, layer.weight, precision)
        records.append(_record(name, precision, error))
        _put(model, name, _module(layer, indices, table))
        if shared and name == EMBEDDING:
            _put(model, HEAD, PaletteLinear(indices, table, None))
            records.append(_record(HEAD, precision, error))
    return tuple(records)


def _layers(model: FastVLM) -> Iterator[tuple[str, _Layer]]:
    """Float layers that may get lookup tables, by name, in the order of the network."""
    excite = {
        id(layer)
        for module in model.modules()
        if isinstance(module, SqueezeExcite)
        for layer in module.children()
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) or (
            isinstance(module, nn.Conv2d) and _is_dense(module) and id(module) not in excite
        ):
            yield name, module


def _is_dense(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a matrix product over channels: 1x1 and one group."""
    return conv.kernel_size == (1, 1) and conv.groups == 1


def _tables(name: str, weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor, float]:
    """Indices like the weight, tables [G,2^bits], relative RMS error of float weights [N,...]."""
    values = (
        weight.detach().float().reshape(len(weight) // (precision.group_size or len(weight)), -1)
    )
    if not values.isfinite().all():
        raise ExportError(
            f"Weights of {name} are not finite.",
            "Run `fastvlm-export inspect` on the checkpoint: they may be damaged.",
        )
    indices, table = cluster(values, int(precision.bits or 0))
    return indices.reshape(weight.shape), table, _error(values, indices, table)


def _error(values: Tensor, indices: Tensor, table: Tensor) -> float:
    """|W - looked up| / |W| of [G,n]."""
    lost = whole = 0.0
    step = max(1, CHUNK // values.shape[1])
    parts = (x.split(step) for x in (values, indices, table))
    for rows, places, entries in zip(*parts, strict=True):
        lost += float((lookup(places, entries) - rows).square().sum(dtype=torch.float64))
        whole += float(rows.square().sum(dtype=torch.float64))
    return float((lost / whole) ** 0.5) if whole > 0 else 0.0


def _module(layer: _Layer, indices: Tensor, table: Tensor) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return PaletteEmbedding(indices, table)
    if isinstance(layer, nn.Linear):
        return PaletteLinear(indices, table, layer.bias)
    return PaletteConv2d(indices, table, layer)


def _put(model: FastVLM, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module.eval())


def _record(layer: str, precision: Precision, error: float) -> LayerRecord:
    return LayerRecord(
        layer=layer,
        bits=int(precision.bits or 0),
        group_size=precision.group_size,
        method=precision.method,
        error=error,
    )


def _linear(table: Tensor) -> nn.Linear:
    """The head of a tied model as a layer of its own, around the embedding's very weights."""
    rows, width = table.shape
    head = nn.Linear(width, rows, bias=False, device="meta")
    head.weight = nn.Parameter(table.detach(), requires_grad=False)
    return head
