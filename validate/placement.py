"""Where Core ML means to run each operation: Neural Engine, GPU or CPU. A Mac's own plan.

Core ML makes the plan when a compiled package is loaded for some compute units. It gives every
operation the devices that could run it, the one preferred, and the operation's share of the
estimated work. Constants, and weights that are unpacked at load time, run nowhere and don't count.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..exporter.bundle import Bundle
from ..exporter.errors import ExportError
from ..quantize.quiet import quiet_import
from ..targets import coreml_session
from ..targets.coreml_model import DECODER, EMBEDDING, EXPORT_HINT, VISION

ORDER = (VISION, EMBEDDING, DECODER)
"""Packages as a prompt goes through them; any other comes after."""


class Device(StrEnum):
    """What can run an operation. UNKNOWN: Core ML's plan does not say."""

    NEURAL_ENGINE = "neural_engine"
    GPU = "gpu"
    CPU = "cpu"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of a program: the name of its first output, its type without the version.

    `cost` is its share of the estimated work of the model, 0 where Core ML gives none.
    """

    name: str
    op_type: str
    device: Device
    supported: frozenset[Device]
    cost: float

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "name": self.name,
            "op_type": self.op_type,
            "device": self.device.value,
            "supported": sorted(self.supported),
            "cost": self.cost,
        }


@dataclass(frozen=True, kw_only=True)
class FunctionPlacement:
    """One function of a package."""

    package: str
    function: str
    operations: tuple[Operation, ...]

    def share_of_operations(self, device: Device) -> float:
        """From 0 to 1; 0 where there are no operations."""
        counts = Counter(one.device for one in self.operations)
        return counts[device] / max(len(self.operations), 1)

    def share_of_cost(self, device: Device) -> float | None:
        """From 0 to 1; None where Core ML estimated nothing."""
        total = sum(one.cost for one in self.operations)
        if not total:
            return None
        return sum(one.cost for one in self.operations if one.device is device) / total

    @property
    def fallen(self) -> tuple[Operation, ...]:
        """Operations that fell off the Neural Engine, the most work first.

        Core ML prefers another device for them, although it runs others of the function there. A
        function of which nothing runs there was never on it.
        """
        if not any(one.device is Device.NEURAL_ENGINE for one in self.operations):
            return ()
        fallen = [one for one in self.operations if one.device in (Device.GPU, Device.CPU)]
        return tuple(sorted(fallen, key=lambda one: -one.cost))

    def to_dict(self) -> dict[str, object]:
        """Plain data: shares by device, and what fell off the Neural Engine."""
        return {
            "package": self.package,
            "function": self.function,
            "operations": len(self.operations),
            "share_of_operations": {one.value: self.share_of_operations(one) for one in Device},
            "share_of_cost": {one.value: self.share_of_cost(one) for one in Device},
            "fallen_off_neural_engine": [one.to_dict() for one in self.fallen],
        }


@dataclass(frozen=True, kw_only=True)
class Placement:
    """All functions of a bundle's packages on one choice of compute units.

    `problem` says why there are none, where Core ML gave no plan.
    """

    compute_units: str
    functions: tuple[FunctionPlacement, ...]
    problem: str = ""

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "compute_units": self.compute_units,
            "problem": self.problem,
            "functions": [one.to_dict() for one in self.functions],
        }


def measure(bundle: Bundle, compute_units: str) -> Placement:
    """Ask Core ML for its plan of every package. Raises ExportError off a Mac, or without one."""
    coreml_session.check_macos()
    with quiet_import():
        from coremltools.models.compute_plan import MLComputePlan  # noqa: PLC0415 - imports torch
    unit = coreml_session.core_ml_unit(compute_units)
    functions: list[FunctionPlacement] = []
    for package in packages_of(bundle):
        try:
            path = coreml_session.compiled(package, compute_units)
            plan = MLComputePlan.load_from_path(str(path), unit)
        except Exception as error:  # whatever Core ML says arrives as RuntimeError or Exception
            raise ExportError(
                f"Core ML gives no plan for {package}: {error}",
                f"See whether it loads: fastvlm-export validate {bundle.path}",
            ) from error
        functions += read_plan(package.name, plan, device_of)
    return Placement(compute_units=compute_units, functions=tuple(functions))


def packages_of(bundle: Bundle) -> list[Path]:
    """The bundle's packages, in the order in which a prompt goes through them."""
    places = {name: index for index, name in enumerate(ORDER)}
    found = bundle.path.glob("*.mlpackage")
    return sorted(found, key=lambda path: (places.get(path.name, len(ORDER)), path.name))


def read_plan(
    package: str, plan: Any, device: Callable[[Any], Device]
) -> tuple[FunctionPlacement, ...]:
    """The functions of an `MLComputePlan`. `device` says what an `MLComputeDevice` is.

    Raises ExportError for a model that is no ML program.
    """
    program = plan.model_structure.program
    if program is None:
        raise ExportError(
            f"{package} is no ML program, so Core ML places no operations of it.",
            EXPORT_HINT,
        )
    functions: Mapping[str, Any] = program.functions
    return tuple(
        FunctionPlacement(
            package=package,
            function=name,
            operations=tuple(_operation(one, plan, device) for one in _operations(function.block)),
        )
        for name, function in functions.items()
    )


def device_of(device: Any) -> Device:
    """An `MLComputeDevice` by its class."""
    with quiet_import():
        from coremltools.models import compute_device as kinds  # noqa: PLC0415 - imports torch
    known: tuple[tuple[type, Device], ...] = (
        (kinds.MLNeuralEngineComputeDevice, Device.NEURAL_ENGINE),
        (kinds.MLGPUComputeDevice, Device.GPU),
        (kinds.MLCPUComputeDevice, Device.CPU),
    )
    return next((found for kind, found in known if isinstance(device, kind)), Device.UNKNOWN)


def _operations(block: Any) -> Iterator[Any]:
    """All that is computed in a block, and in the blocks of its loops and conditions."""
    for operation in block.operations:
        if not _is_constant(_op_type(operation)):
            yield operation
        for inner in operation.blocks:
            yield from _operations(inner)


def _op_type(operation: Any) -> str:
    """`ios18.conv` -> `conv`: the version of the operator set says nothing about placement."""
    name: str = operation.operator_name
    return name.rpartition(".")[2]


def _is_constant(op_type: str) -> bool:
    return op_type == "const" or op_type.startswith("constexpr_")


def _operation(operation: Any, plan: Any, device: Callable[[Any], Device]) -> Operation:
    usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
    cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
    return Operation(
        name=operation.outputs[0].name if operation.outputs else "",
        op_type=_op_type(operation),
        device=device(usage.preferred_compute_device) if usage else Device.UNKNOWN,
        supported=frozenset(map(device, usage.supported_compute_devices if usage else ())),
        cost=float(cost.weight) if cost else 0.0,
    )
