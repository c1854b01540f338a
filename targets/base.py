"""What every target provides, and the one interface that every artifact opens as."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from ..exporter.errors import ExportError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..exporter.bundle import Bundle
    from ..exporter.spec import ExportSpec
    from ..quantize.recipes import Recipe

Array = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Session(Protocol):
    """A FastVLM that runs somewhere: eager PyTorch, an artifact in its runtime, a device.

    float32 and int64 NumPy arrays in and out, batch 1. The session owns the key/value cache.
    """

    def encode_image(self, pixels: Array) -> Array:
        """Pixels [1,3,R,R] -> projected image features [1,N,D]."""
        ...

    def embed(self, input_ids: TokenIds) -> Array:
        """Token ids [1,S] -> embeddings [1,S,D]."""
        ...

    def decode(self, inputs_embeds: Array) -> Array:
        """Embeddings [1,S,D], appended to the cache -> logits of the last position [1,V].

        Raises ExportError when the cache would hold more than the context.
        """
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...


@dataclass(frozen=True, kw_only=True)
class Availability:
    """Whether a target can lower and run on this machine, and what to do where it can't."""

    lower: bool
    run: bool
    versions: Mapping[str, str]
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a target wrote: its version record and the names of each graph's inputs and outputs."""

    graphs: Mapping[str, Mapping[str, Mapping[str, str]]]
    """graph -> "inputs" or "outputs" -> tensor name -> "float32[1,3,256,256]"."""
    details: Mapping[str, str | int] = field(default_factory=dict)
    """What a client must know besides, for the manifest: layout, prefill chunk, ..."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a part of a bundle says beside its numbers, and what it should say, as JSON values.

    `where` is a file of the bundle. `found` is None where there is no such file.
    """

    where: str
    found: Any
    wanted: Any


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may choose about a target's files besides the recipe. None: its default.

    `layout` is the client that the folder is for, `deployment_target` the oldest system, `backend`
    what computes inside of the runtime; `external_weights`: large weights in a file of their own;
    `compute_capabilities`: the GPUs that engines are built for, such as "89".
    """

    layout: str | None = None
    deployment_target: str | None = None
    backend: str | None = None
    external_weights: bool | None = None
    compute_capabilities: tuple[str, ...] | None = None


DEFAULTS = Options()
FLAGS = {"compute_capabilities": "--compute-capability"}
"""Fields of `Options` that the command line calls otherwise: there it is one list."""


def foreign_options(options: Options, target: str, own: Collection[str] = ()) -> list[str]:
    """A line for each option that is given and not one of the target's own fields."""
    given = {
        field.name: value
        for field in fields(Options)
        if (value := getattr(options, field.name)) is not None and field.name not in own
    }
    return [
        f"{flag(name)}{_argument(value)}: target '{target}' has no such choice"
        for name, value in given.items()
    ]


def flag(name: str) -> str:
    """A field of `Options` as the command line calls it."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def _argument(value: object) -> str:
    """What stands behind a flag on the command line."""
    if value is True:
        return ""
    return f" {','.join(value) if isinstance(value, tuple) else value}"


class Target(Protocol):
    """A module of this folder: lowers exported programs to files, opens them again.

    `RUNTIME_PACKAGES` are what `open` imports: their import is no part of an artifact's load time.
    """

    @property
    def RUNTIME_PACKAGES(self) -> tuple[str, ...]:  # noqa: N802 - a module's constant
        """Names of packages."""
        ...

    def availability(self) -> Availability:
        """Look for the packages that lowering and running need, without importing torch."""
        ...

    def adapt(self, recipe: "Recipe", options: Options = DEFAULTS) -> "Recipe":
        """The built-in recipe as this runtime computes it; any other recipe as it is."""
        ...

    def option_problems(self, options: Options) -> list[str]:
        """Every reason why the options can't be had here; none: they can."""
        ...

    def problems(
        self,
        recipe: "Recipe",
        layers: Mapping[str, int] | None,
        *,
        tied: bool = False,
        options: Options = DEFAULTS,
    ) -> list[str]:
        """Every reason why this format can't express the recipe; none: it can.

        `layers`: layer name -> input width, where the model is known; `tied`: its head's weights
        are the embedding table's.
        """
        ...

    def contract_problems(self, spec: "ExportSpec", options: Options = DEFAULTS) -> list[str]:
        """Every reason why the clients of these files could not run this model; none: they can."""
        ...

    def lower(
        self,
        programs: Mapping[str, "ExportedProgram"],
        spec: "ExportSpec",
        recipe: "Recipe",
        out: Path,
        options: Options = DEFAULTS,
    ) -> Artifact:
        """Write the artifact's files below the existing, empty folder `out`.

        The programs are the recipe's already: it says how to name things.
        """
        ...

    def statements(
        self,
        bundle: "Bundle",
        spec: "ExportSpec",
        programs: "Callable[[], Mapping[str, ExportedProgram]] | None",
    ) -> Iterable[Statement]:
        """What clients read of a bundle beside its numbers: their files, the manifest's `graphs`.

        `programs` gives what was lowered, where that is known. Raises ExportError for an artifact
        that can't be read.
        """
        ...

    def open(self, bundle: "Bundle") -> Session:
        """Load the artifact for running. Raises ExportError where it can't be."""
        ...


def available_cores() -> int:
    """Physical cores that this process may use: hyperthreads share the units that matrices need."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return min(physical, len(os.sched_getaffinity(0)))
    return physical


def check_context(past: int, new: int, context: int) -> None:
    """Refuse to let the cache grow past the context."""
    if past + new > context:
        raise ExportError(
            f"The context holds {context} positions; {past} are taken and {new} more were given.",
            "Ask for fewer tokens, or export again with a larger --context.",
        )
