"""Where an ExecuTorch program computes: what each method hands over to its backend, what it keeps.

Read from the program file alone. A method is a list of calls: of delegates, which are graphs of
their own inside the backend, and of the runtime's portable operators, one after the other. Every
delegate more costs copies between the two, and a portable operator is slower than the backend's by
a factor, so that the encoder and the decoder are to be one delegate each and little beside it.

FLOPs: a product of matrices or a convolution counts two for every multiplication with its addition,
any other arithmetic operator one for every number that it gives, and what only moves, converts,
compares, chooses or looks up numbers none. Sizes that depend on the prompt are taken at their upper
bound, which for the length of a sequence is the context: the file holds no other.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..exporter.bundle import VALIDATE_HINT, Bundle
from ..exporter.errors import ExportError
from ..targets import TargetName
from ..targets.executorch_model import (
    DECODER,
    EMBEDDING,
    EXPORT_HINT,
    PROGRAM,
    VISION,
    WEIGHTS,
    Backend,
)
from .checks import Check, missing
from .delegation_work import portable_operator, xnn_operators
from .formats import number

if TYPE_CHECKING:
    from ..targets.executorch_file import Delegate, Method, PteFile

BACKEND_NAMES = {Backend.XNNPACK: "XnnpackBackend", Backend.COREML: "CoreMLBackend"}
"""As programs call them; no other backend can be had yet, and `portable` is none."""

LIMITED = (VISION, DECODER)
"""Methods that are to be one delegate; the embedding only looks up a table."""

MOST_OUTSIDE = 1e-3
"""Of a method's FLOPs; the cache's and the masks' operators, which stay outside, have none."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """All operators of one kind: their number, and the FLOPs of all of them together."""

    kind: str
    nodes: int
    flops: int


def gather(operators: Iterable[tuple[str, int]]) -> tuple[Work, ...]:
    """(kind, FLOPs) of each operator -> by kind, the most FLOPs first, then the most operators."""
    nodes: dict[str, int] = defaultdict(int)
    flops: dict[str, int] = defaultdict(int)
    for kind, count in operators:
        nodes[kind] += 1
        flops[kind] += count
    found = [Work(kind=kind, nodes=nodes[kind], flops=flops[kind]) for kind in nodes]
    return tuple(sorted(found, key=lambda one: (-one.flops, -one.nodes, one.kind)))


@dataclass(frozen=True, kw_only=True)
class MethodDelegation:
    """One method: its delegates by their backends' names, what is inside of them and what outside.

    `expected` is the one backend that it is to be handed over to, whole; None: no limit. `between`
    are the kinds of operators that run between two delegates: what splits it.
    """

    method: str
    delegates: tuple[str, ...]
    inside: tuple[Work, ...]
    outside: tuple[Work, ...]
    expected: str | None = None
    between: tuple[str, ...] = ()

    @property
    def nodes_inside(self) -> int:
        """Operators in delegates."""
        return sum(one.nodes for one in self.inside)

    @property
    def nodes_outside(self) -> int:
        """Operators that the runtime itself computes."""
        return sum(one.nodes for one in self.outside)

    @property
    def flops_inside(self) -> int:
        """FLOPs in delegates."""
        return sum(one.flops for one in self.inside)

    @property
    def flops_outside(self) -> int:
        """FLOPs of the runtime's own operators."""
        return sum(one.flops for one in self.outside)

    @property
    def share_of_nodes(self) -> float | None:
        """Of all operators, those in delegates: from 0 to 1; None where there are none."""
        return _share(self.nodes_inside, self.nodes_outside)

    @property
    def share_of_flops(self) -> float | None:
        """Of all FLOPs, those in delegates: from 0 to 1; None where there are none."""
        return _share(self.flops_inside, self.flops_outside)

    @property
    def checks(self) -> tuple[Check, ...]:
        """One delegate, of the backend that was asked for, and next to nothing beside it."""
        if self.expected is None:
            return ()
        others = sum(name != self.expected for name in self.delegates)
        delegates = Check(name="delegates", value=len(self.delegates), limit=1)
        if not self.delegates:
            delegates = missing("delegates", 1, f"nothing is handed over to {self.expected}")
        outside = missing("FLOPs outside", MOST_OUTSIDE, "the method computes nothing")
        if (share := self.share_of_flops) is not None:
            outside = Check(name="FLOPs outside", value=1 - share, limit=MOST_OUTSIDE)
        foreign = Check(name="delegates of other backends", value=others, limit=0)
        return delegates, outside, foreign

    @property
    def passed(self) -> bool:
        """Whether every limit held; without limits, always."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "method": self.method,
            "passed": self.passed,
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "delegates": list(self.delegates),
            "between_delegates": list(self.between),
            "nodes_inside": self.nodes_inside,
            "nodes_outside": self.nodes_outside,
            "share_of_nodes": self.share_of_nodes,
            "flops_inside": self.flops_inside,
            "flops_outside": self.flops_outside,
            "share_of_flops": self.share_of_flops,
            "inside": [asdict(one) for one in self.inside],
            "outside": [asdict(one) for one in self.outside],
        }


def _share(inside: int, outside: int) -> float | None:
    return inside / (inside + outside) if inside + outside else None


@dataclass(frozen=True, kw_only=True)
class Delegation:
    """Every method of a program, in the order in which a prompt goes through them."""

    backend: str
    methods: tuple[MethodDelegation, ...]

    @property
    def passed(self) -> bool:
        """Whether there are methods and every limit of each held."""
        return bool(self.methods) and all(one.passed for one in self.methods)

    @property
    def limited(self) -> bool:
        """Whether anything was to be handed over."""
        return any(one.expected is not None for one in self.methods)

    @property
    def verdict(self) -> str:
        """One sentence: what broke a limit, or how much of the work is in how many delegates."""
        if not self.methods:
            return "The program has no method of ours."
        broken = [
            f"{one.method}: {_broken(check, one)}"
            for one in self.methods
            for check in one.checks
            if not check.passed
        ]
        if broken:
            return f"Placement beyond its limits: {'; '.join(broken)}."
        if not self.limited:
            return f"Nothing is handed over: backend '{self.backend}' has no limit on placement."
        held = [one for one in self.methods if one.expected is not None]
        return f"In one delegate each: {', '.join(map(_held, held))}."

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "definition": (__doc__ or "").strip(),
            "backend": self.backend,
            "passed": self.passed,
            "verdict": self.verdict,
            "methods": [one.to_dict() for one in self.methods],
        }


def _broken(check: Check, method: MethodDelegation) -> str:
    if check.message:
        return check.message
    split = check.name == "delegates" and method.between
    by = f", split by {', '.join(method.between)}" if split else ""
    return f"{check.name} {number(check.value)} (limit {number(check.limit)}){by}"


def _held(one: MethodDelegation) -> str:
    return f"{one.method} with {percent(one.share_of_flops)} of its FLOPs"


def percent(share: float | None) -> str:
    """0.99987 -> 99.98 %, never rounded up to 100 %; a dash where there is no share."""
    if share is None:
        return "-"
    return f"{int(share * 10_000) / 100:.4g} %"


def has_delegation(bundle: Bundle) -> bool:
    """Whether a bundle's program hands parts of itself over to backends: ExecuTorch's."""
    return bundle.manifest.target == TargetName.EXECUTORCH


def delegation(bundle: Bundle) -> Delegation:
    """The placement of an ExecuTorch bundle, from its files alone.

    Raises ExportError for a file that is damaged, and for a backend that there is not.
    """
    from ..targets.executorch_file import read  # noqa: PLC0415 - XNNPACK's graphs import torch

    backend = bundle.manifest.artifact.get("backend")
    if backend not in (*BACKEND_NAMES, Backend.PORTABLE):
        raise ExportError(
            f"{bundle.path}: the manifest names the backend {backend!r}.", VALIDATE_HINT
        )
    weights = bundle.path / WEIGHTS
    program = read(
        bundle.path / PROGRAM, weights if weights.name in bundle.manifest.files else None
    )
    return Delegation(
        backend=str(backend),
        methods=tuple(
            _method(program, name, str(backend), bundle.manifest.context)
            for name in (VISION, EMBEDDING, DECODER)
        ),
    )


def _method(program: "PteFile", name: str, backend: str, context: int) -> MethodDelegation:
    if name not in program.methods:
        raise ExportError(f"{program.source} has no method '{name}'.", EXPORT_HINT)
    method = program.methods[name]
    if backend == Backend.PORTABLE and method.delegates:
        raise ExportError(
            f"{program.source}: '{name}' has a delegate of {method.delegates[0].backend}, the "
            f"manifest's backend is {backend}.",
            EXPORT_HINT,
        )
    return MethodDelegation(
        method=name,
        delegates=tuple(one.backend for one in method.delegates),
        inside=gather(work for one in method.delegates for work in _inside(one, context)),
        outside=gather(map(portable_operator, method.calls)),
        expected=BACKEND_NAMES.get(Backend(backend)) if name in LIMITED else None,
        between=_between(method),
    )


def _between(method: "Method") -> tuple[str, ...]:
    """Kinds of operators that run after a method's first delegate and before its last."""
    places = [i for i, step in enumerate(method.steps) if hasattr(step, "backend")]
    inner = method.steps[places[0] : places[-1]] if places else ()
    return tuple(dict.fromkeys(step.operator for step in inner if hasattr(step, "operator")))


def _inside(delegate: "Delegate", context: int) -> Iterable[tuple[str, int]]:
    """(kind, FLOPs) of each operator of a delegate."""
    if delegate.backend == BACKEND_NAMES[Backend.XNNPACK]:
        from ..targets.executorch_xnn import xnn_graph  # noqa: PLC0415 - imports torch

        return xnn_operators(xnn_graph(delegate))
    if delegate.backend == BACKEND_NAMES[Backend.COREML]:
        from .delegation_coreml import coreml_operators  # noqa: PLC0415 - imports coremltools

        return coreml_operators(delegate, context)
    raise ExportError(
        f"{delegate.file.source} has a delegate of {delegate.backend}, which can't be read here.",
        EXPORT_HINT,
    )
