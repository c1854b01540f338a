"""Stand-ins for what coremltools has on a Mac only: compiled packages, running, compute plans.

They have the real signatures, which test_coreml_device checks, and are as particular about types.
What they compute comes from the reference interpreter.
"""

import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import coreml
from fastvlm_export.targets.base import Availability
from fastvlm_export.targets.coreml_model import MAIN
from fastvlm_export.validate.mil import open_model

with quiet_import():
    import coremltools
    from coremltools.models import compute_device, compute_plan, utils

FALLING = ("matmul", "gather")
"""Operators that the plans of `StandInPlan` keep off the Neural Engine."""


class StandInState:
    def __init__(self, value: Any) -> None:
        self.value = value


class StandInModel:
    """CompiledMLModel: a function of a compiled package."""

    opened: ClassVar[list[tuple[str, str | None, str]]] = []

    def __init__(
        self,
        path,
        compute_units=coremltools.ComputeUnit.ALL,
        function_name=None,
        optimization_hints=None,
        asset=None,
    ):
        assert isinstance(path, str)
        assert isinstance(compute_units, coremltools.ComputeUnit)
        package = package_in(path)
        self.opened.append((package.name, function_name, compute_units.name))
        self.model = open_model(package, function_name or MAIN)

    def predict(self, data, state=None):
        assert type(data) is dict
        assert state is None or isinstance(state, StandInState)
        if set(data) != set(self.model.inputs):
            raise RuntimeError("Error computing NN outputs.")
        return self.model.predict(data, state.value if state else None)

    def make_state(self):
        return StandInState(self.model.make_state())


def compile_model(model, destination_path=None):
    """A compiled package is its copy in a folder of the other suffix."""
    assert isinstance(model, str)
    assert destination_path.endswith(".mlmodelc")
    assert not Path(destination_path).exists()
    shutil.copytree(model, Path(destination_path) / Path(model).name)
    return destination_path


def package_in(compiled: str) -> Path:
    package = next(Path(compiled).glob("*.mlpackage"), None)
    if not compiled.endswith(".mlmodelc") or package is None:
        raise RuntimeError(f"Error reading {compiled}")
    return package


class StandInPlan(compute_plan.MLComputePlan):
    """The structure of the saved program; all on the Neural Engine but constants and FALLING."""

    def __init__(self, package: Path) -> None:
        specification = utils.load_spec(str(next(package.rglob("*.mlmodel"))))
        functions = {
            name: compute_plan.MLModelStructureProgramFunction(
                inputs=[], block=_block(next(iter(one.block_specializations.values())))
            )
            for name, one in specification.mlProgram.functions.items()
        }
        program = compute_plan.MLModelStructureProgram(functions=functions)
        self.structure = compute_plan.MLModelStructure(
            neuralnetwork=None, program=program, pipeline=None
        )

    @property
    def model_structure(self):
        return self.structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        if operation.operator_name == "const":
            return None
        falls = operation.operator_name.endswith(FALLING)
        kind = (
            compute_device.MLCPUComputeDevice
            if falls
            else compute_device.MLNeuralEngineComputeDevice
        )
        device = object.__new__(kind)  # its constructor wants what only a Mac has
        return compute_plan.MLComputePlanDeviceUsage(
            preferred_compute_device=device, supported_compute_devices=[device]
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        return compute_plan.MLComputePlanCost(weight=0.01)


def _block(block: Any) -> Any:
    return compute_plan.MLModelStructureProgramBlock(
        inputs=[], operations=list(_operations(block)), output_names=list(block.outputs)
    )


def _operations(block: Any) -> Iterator[Any]:
    for one in block.operations:
        outputs = [
            compute_plan.MLModelStructureProgramNamedValueType(
                name=output.name, type=compute_plan.MLModelStructureProgramValueType()
            )
            for output in one.outputs
        ]
        yield compute_plan.MLModelStructureProgramOperation(
            inputs={},
            operator_name=one.type if one.type == "const" else f"ios18.{one.type}",
            outputs=outputs,
            blocks=[_block(inner) for inner in one.blocks],
            __proxy__=None,
        )


def load_from_path(path, compute_units=coremltools.ComputeUnit.ALL):
    """MLComputePlan's."""
    assert isinstance(path, str)
    assert isinstance(compute_units, coremltools.ComputeUnit)
    return StandInPlan(package_in(path))


def install(patch: Callable[[Any, str, Any], None]) -> None:
    """Put the stand-ins in place, and let the target say that it runs here."""
    here = Availability(lower=True, run=True, versions={"coremltools": "9.0"})
    patch(coreml, "availability", lambda: here)
    patch(utils, "compile_model", compile_model)
    patch(coremltools.models, "CompiledMLModel", StandInModel)
    patch(compute_plan.MLComputePlan, "load_from_path", load_from_path)
    patch(platform, "system", lambda: "Darwin")
    patch(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
