"""Plans made by hand, of coremltools' own classes: what Core ML would have said on a Mac."""

import inspect
import json
import platform
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastvlm_export.exporter.errors import ExportError
from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import coreml_session
from fastvlm_export.validate import placement
from fastvlm_export.validate.placement import Device, device_of, packages_of, read_plan
from fastvlm_export.validate.placement_view import placement as view

with quiet_import():
    import coremltools
    from coremltools.models import compute_device, compute_plan


def device(kind):
    return object.__new__(kind)  # its constructor wants what only a Mac has


ANE = device(compute_device.MLNeuralEngineComputeDevice)
GPU = device(compute_device.MLGPUComputeDevice)
CPU = device(compute_device.MLCPUComputeDevice)


def operation(name, op_type, blocks=()):
    value = compute_plan.MLModelStructureProgramNamedValueType(
        name=name, type=compute_plan.MLModelStructureProgramValueType()
    )
    return compute_plan.MLModelStructureProgramOperation(
        inputs={}, operator_name=op_type, outputs=[value], blocks=list(blocks), __proxy__=None
    )


def block(operations):
    return compute_plan.MLModelStructureProgramBlock(
        inputs=[], operations=list(operations), output_names=[]
    )


class Plan(compute_plan.MLComputePlan):
    """A plan whose answers are given: output name -> (preferred, supported, cost)."""

    def __init__(self, functions, answers):
        program = compute_plan.MLModelStructureProgram(
            functions={
                name: compute_plan.MLModelStructureProgramFunction(inputs=[], block=block(body))
                for name, body in functions.items()
            }
        )
        self.structure = compute_plan.MLModelStructure(
            neuralnetwork=None, program=program, pipeline=None
        )
        self.answers = answers

    @property
    def model_structure(self):
        return self.structure

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        found = self.answers.get(operation.outputs[0].name)
        return found and compute_plan.MLComputePlanDeviceUsage(
            preferred_compute_device=found[0], supported_compute_devices=list(found[1])
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        found = self.answers.get(operation.outputs[0].name)
        return found and found[2] is not None and compute_plan.MLComputePlanCost(weight=found[2])


ANSWERS = {
    "stem": (ANE, (ANE, GPU, CPU), 0.5),
    "norm": (CPU, (CPU,), 0.1),
    "gelu": (GPU, (ANE, GPU, CPU), 0.25),
    "inner": (ANE, (ANE, CPU), 0.15),
}
BODY = [
    operation("weight", "const"),
    operation("table", "ios18.constexpr_lut_to_dense"),
    operation("stem", "ios18.conv"),
    operation("norm", "ios18.layer_norm"),
    operation("gelu", "ios18.gelu"),
    operation("branch", "ios18.cond", [block([operation("inner", "ios18.mul")])]),
]


def main_function(answers=ANSWERS, body=BODY):
    (found,) = read_plan("vision.mlpackage", Plan({"main": body}, answers), device_of)
    return found


def test_operations_and_costs_are_shared_out_without_constants():
    found = main_function()
    assert [one.name for one in found.operations] == ["stem", "norm", "gelu", "branch", "inner"]
    shares = {one: found.share_of_operations(one) for one in Device}
    assert shares == {
        Device.NEURAL_ENGINE: 2 / 5,
        Device.GPU: 1 / 5,
        Device.CPU: 1 / 5,
        Device.UNKNOWN: 1 / 5,  # the plan says nothing about the condition itself
    }
    assert found.share_of_cost(Device.NEURAL_ENGINE) == pytest.approx(0.65)
    assert found.share_of_cost(Device.UNKNOWN) == 0


def test_what_fell_off_is_named_with_the_most_work_first():
    fallen = main_function().fallen
    assert [(one.name, one.op_type, one.device) for one in fallen] == [
        ("gelu", "gelu", Device.GPU),
        ("norm", "layer_norm", Device.CPU),
    ]
    assert [Device.NEURAL_ENGINE in one.supported for one in fallen] == [True, False]


def test_a_function_that_never_was_on_the_neural_engine_fell_off_nothing():
    answers = {name: (CPU, (ANE, CPU), cost) for name, (_, _, cost) in ANSWERS.items()}
    found = main_function(answers)
    assert found.fallen == ()
    assert found.share_of_cost(Device.CPU) == 1


def test_costs_of_one_function_add_up_to_one_whatever_the_others_take():
    answers = ANSWERS | {"other": (GPU, (GPU,), 9.0)}
    plan = Plan({"prefill": BODY, "decode": [operation("other", "ios18.matmul")]}, answers)
    prefill, decode = read_plan("decoder.mlpackage", plan, device_of)
    assert [prefill.function, decode.function] == ["prefill", "decode"]
    for found in (prefill, decode):
        assert sum(found.share_of_cost(one) for one in Device) == pytest.approx(1)
    assert decode.share_of_cost(Device.GPU) == 1


def test_a_plan_without_answers_gives_no_cost():
    found = main_function({})
    assert found.share_of_operations(Device.UNKNOWN) == 1
    assert found.share_of_cost(Device.CPU) is None
    assert found.to_dict()["share_of_cost"]["cpu"] is None


def test_an_estimate_may_be_missing_where_the_device_is_known():
    found = main_function({"stem": (ANE, (ANE,), None), "norm": (CPU, (CPU,), 0.5)})
    assert found.share_of_cost(Device.CPU) == 1
    assert found.operations[0].device is Device.NEURAL_ENGINE


def test_an_unknown_device_is_called_that():
    assert device_of(object()) is Device.UNKNOWN


def test_a_model_of_another_kind_is_refused():
    plan = Plan({}, {})
    plan.structure = compute_plan.MLModelStructure(neuralnetwork=None, program=None, pipeline=None)
    with pytest.raises(ExportError, match="no ML program"):
        read_plan("vision.mlpackage", plan, device_of)


@pytest.fixture
def bundle(tmp_path):
    for name in ("decoder", "vision", "extra", "embedding"):
        (tmp_path / f"{name}.mlpackage").mkdir()
    return SimpleNamespace(path=tmp_path)


def test_packages_come_in_the_order_of_a_prompts_way(bundle):
    names = [path.stem for path in packages_of(bundle)]
    assert names == ["vision", "embedding", "decoder", "extra"]


def names_of(function):
    return [(one.name, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.fixture
def mac(monkeypatch):
    """A Mac with compiled packages; gives what was asked of Core ML."""
    asked = []

    def load(path, compute_units=coremltools.ComputeUnit.ALL):
        asked.append((path, compute_units.name))
        return Plan({"main": BODY}, ANSWERS)

    assert names_of(load) == names_of(compute_plan.MLComputePlan.load_from_path)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(coreml_session, "compiled", lambda path, units: path / units)
    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", load)
    return asked


def test_every_package_is_asked_about_on_the_units(bundle, mac):
    found = placement.measure(bundle, "cpu-and-ne")
    assert [one.package.partition(".")[0] for one in found.functions] == [
        "vision",
        "embedding",
        "decoder",
        "extra",
    ]
    vision = bundle.path / "vision.mlpackage" / "cpu-and-ne"
    assert mac[0] == (str(vision), "CPU_AND_NE")
    assert json.loads(json.dumps(found.to_dict()))["compute_units"] == "cpu-and-ne"


def test_core_mls_refusal_is_one_error(bundle, mac, monkeypatch):
    def refuse(path, compute_units):
        raise RuntimeError("no such model")

    monkeypatch.setattr(compute_plan.MLComputePlan, "load_from_path", refuse)
    with pytest.raises(ExportError, match=r"no plan for .*vision.mlpackage: no such model"):
        placement.measure(bundle, "all")


def test_off_a_mac_there_is_no_placement(bundle, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(ExportError, match="macOS 15 or later"):
        placement.measure(bundle, "all")


def shown(*functions):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(view([placement.Placement(compute_units="all", functions=functions)]))
    return capture.get()


def test_the_terminal_shows_shares_and_what_fell_off():
    text = shown(main_function())
    assert "Placement by Core ML, all" in text
    assert "40 %, 65 %" in text
    assert "vision main: 2 operations fell off the Neural Engine" in text
    assert "gelu gelu: GPU, could run there" in text
    assert "layer_norm norm: CPU, can't run there" in text
    assert "not said" in text


def test_the_terminal_lists_only_the_costliest():
    body = [operation("stem", "ios18.conv")]
    body += [operation(f"norm{index}", "ios18.layer_norm") for index in range(20)]
    answers = {f"norm{index}": (CPU, (CPU,), 0.01 * index) for index in range(20)}
    text = shown(main_function({"stem": (ANE, (ANE,), 0.5)} | answers, body))
    assert "norm19" in text
    assert "norm8:" in text
    assert "norm7" not in text
    assert "and 8 more" in text
    assert "not said" not in text
