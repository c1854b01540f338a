"""A small random model as an ExecuTorch program, and what it computes without rounding."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvlm_export.quantize.recipes import RECIPES
from fastvlm_export.targets import executorch
from fastvlm_export.targets.base import Array
from fastvlm_export.targets.eager import ProgramSession
from fastvlm_export.targets.executorch_file import Delegate, Method, parse
from fastvlm_export.targets.executorch_flatbuffer import Table
from fastvlm_export.targets.executorch_model import DECODER, EMBEDDING, PROGRAM, VISION
from fastvlm_export.targets.executorch_xnn import xnn_table
from fastvlm_export.validate.pte import Program

from ...targets.conftest import RESOLUTION, lively_model, make_spec, normal, programs_of, worst

CHUNKS = (9, 1, 1)
"""Tokens of the calls that fill the cache: a prompt, then one at a time."""
STAGES = ("features", "embeds", *(f"logits {number}" for number in range(len(CHUNKS))))
RECORDED = "recorded.npz"


def write(folder: Path) -> None:
    """Lower a model of 4-bit groups, static and per-token 8-bit layers; note its numbers."""
    spec = make_spec(model := lively_model(260, tied=True, depths=(1, 1, 1, 1, 1), layers=2))
    recipe = executorch.adapt(RECIPES["int4"])
    programs = programs_of(model, spec, recipe)
    folder.mkdir()
    executorch.lower(programs, spec, recipe, folder)
    session = ProgramSession(programs, spec.decoder, spec.context, exact=True)
    pixels, ids = normal(1, 3, RESOLUTION, RESOLUTION), np.arange(sum(CHUNKS))[None]
    embeds = session.embed(ids)
    cuts = np.split(embeds, np.cumsum(CHUNKS)[:-1], 1)
    made = [session.encode_image(pixels), embeds, *map(session.decode, cuts)]
    np.savez(folder / RECORDED, pixels=pixels, ids=ids, **dict(zip(STAGES, made, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The program's bytes, and the reference's numbers by stage."""

    pte: bytes
    arrays: dict[str, Array]

    def differences(self, pte: bytes | None = None, *methods: str) -> dict[str, float]:
        """Stage -> the interpreter's largest difference, as a share of the largest number.

        Of some methods, or of all.
        """
        file = parse(memoryview(pte or self.pte), PROGRAM)
        wanted = methods or tuple(file.methods)
        program = Program(
            replace(
                file, methods={name: one for name, one in file.methods.items() if name in wanted}
            )
        )

        def run(method: str, *inputs: Any) -> Array:
            [out] = program.run(method, [torch.from_numpy(np.array(one)) for one in inputs])
            found: Array = out.numpy()
            return found

        made: dict[str, Array] = {}
        if VISION in wanted:
            made["features"] = run(VISION, self.arrays["pixels"])
        if EMBEDDING in wanted:
            made["embeds"] = run(EMBEDDING, self.arrays["ids"])
        begin = 0
        for number, count in enumerate(CHUNKS if DECODER in wanted else ()):
            rows = self.arrays["embeds"][:, begin : begin + count]
            positions = np.arange(begin, begin + count)
            made[f"logits {number}"] = run(DECODER, rows, positions)[:, -1]
            begin += count
        return {stage: worst(found, self.arrays[stage]) for stage, found in made.items()}


def read(folder: Path) -> Recorded:
    """What `write` wrote."""
    with np.load(folder / RECORDED) as arrays:
        return Recorded(pte=(folder / PROGRAM).read_bytes(), arrays=dict(arrays))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The delegate of a method in a program's bytes, to change numbers of it."""

    pte: bytes
    method: Method
    delegate: Delegate
    table: Table

    @staticmethod
    def of(pte: bytes, method: str) -> "Graph":
        found = parse(memoryview(pte), PROGRAM).methods[method]
        [delegate] = found.delegates
        return Graph(pte=pte, method=found, delegate=delegate, table=xnn_table(delegate))

    @property
    def nodes(self) -> Iterator[Table]:
        for entry in self.table.xnodes:
            yield entry.xnode_union

    @property
    def values(self) -> dict[int, Table]:
        unions = [entry.xvalue_union for entry in self.table.xvalues]
        return {union.fields.get("tensor_value", union).id_out: union for union in unions}

    def changed(self, table: Table, **numbers: int | float) -> bytes:
        """The program with other numbers in the place of a table's own, of four bytes each."""
        payload = bytes(self.delegate.processed)
        begin = self.pte.index(payload) + int.from_bytes(payload[10:14], "little")
        data = bytearray(self.pte)
        for name, number in numbers.items():
            at = begin + table.places[name]
            if isinstance(number, float):
                data[at : at + 4] = struct.pack("<f", number)
            else:
                data[at : at + 4] = struct.pack("<I", number % 2**32)
        return bytes(data)
