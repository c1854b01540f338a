"""A small program with the three methods, as the target writes them: for tests of what reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import executorch_lowering, executorch_pack

with quiet_import():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

SIDE, ROWS, WIDTH, WORDS, CONTEXT = 16, 4, 16, 260, 32


class Vision(nn.Module):
    """Pixels [1,3,16,16] -> [1,4,16]: patches of 8 x 8 and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, stride=8)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).flatten(2).transpose(1, 2)


class Embedding(nn.Module):
    """Ids [1,S] -> [1,S,16]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.table)


class Decoder(nn.Module):
    """Adds up what the cache holds, up to each position: enough to tell whether it is kept."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = nn.Parameter(table.clone())
        self.register_buffer("cache", torch.zeros(CONTEXT, WIDTH))
        self.register_buffer("places", torch.arange(CONTEXT))

    def forward(self, embeds: Tensor, position: Tensor) -> Tensor:
        mixed = torch.tanh(self.mix(embeds[0]))
        self.cache.index_put_((position,), mixed)
        seen = (self.places <= position[-1:]).float()
        return self.head((seen[None] @ self.cache)[None])


def modules() -> dict[str, nn.Module]:
    """Method -> module, seeded; the head's weights are the table's."""
    torch.manual_seed(0)
    table = torch.randn(WORDS, WIDTH)
    made = {
        "vision_encoder": Vision(),
        "token_embedding": Embedding(table),
        "text_decoder": Decoder(table),
    }
    return {name: module.eval().requires_grad_(False) for name, module in made.items()}


def exported(made: dict[str, nn.Module]) -> dict[str, ExportedProgram]:
    """The modules as methods, sequences of any length up to the context."""
    length = Dim("length", min=1, max=CONTEXT)
    inputs: dict[str, tuple[tuple[Tensor, ...], object]] = {
        "vision_encoder": ((torch.zeros(1, 3, SIDE, SIDE),), None),
        "token_embedding": ((torch.zeros(1, 3, dtype=torch.int64),), ({1: length},)),
        "text_decoder": (
            (torch.zeros(1, 3, WIDTH), torch.arange(3)),
            ({1: length}, {0: length}),
        ),
    }
    return {
        name: torch.export.export(made[name], given, dynamic_shapes=dynamic, strict=False)
        for name, (given, dynamic) in inputs.items()
    }


@dataclass(frozen=True, kw_only=True)
class Toy:
    """The program as a file, as it is before equal bytes are shared, and with weights apart."""

    modules: dict[str, Any]
    program: Path
    unshared: bytes
    external: tuple[bytes, bytes]


CONSTANTS: dict[str, object] = {
    "get_max_seq_len": CONTEXT,
    "get_max_context_len": CONTEXT,
    "enable_dynamic_shape": True,
    "get_eos_ids": [3, 4],
    "modality": "vision",
}


def write_toy(folder: Path) -> None:
    """Lower the modules; what is shared and what goes apart is small here."""
    made = modules()

    def lowered(*, external: bool) -> executorch_lowering.Lowered:
        partitioners = {name: [XnnpackPartitioner()] for name in made}
        return executorch_lowering.lower(exported(made), partitioners, CONSTANTS, external=external)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executorch_pack, "SMALLEST_EXTERNAL", executorch_pack.SMALLEST_SHARED)
        apart = lowered(external=True)
        assert apart.ptd is not None
        patch.setattr(executorch_pack, "share", lambda pte: pte)
        unshared = lowered(external=False).pte
    folder.mkdir()
    (folder / "unshared").write_bytes(unshared)
    (folder / "apart").write_bytes(apart.pte)
    (folder / "weights").write_bytes(apart.ptd)
    (folder / "model.pte").write_bytes(executorch_pack.share(unshared))


def read_toy(folder: Path) -> Toy:
    """What `write_toy` wrote."""
    return Toy(
        modules=modules(),
        program=folder / "model.pte",
        unshared=(folder / "unshared").read_bytes(),
        external=((folder / "apart").read_bytes(), (folder / "weights").read_bytes()),
    )
