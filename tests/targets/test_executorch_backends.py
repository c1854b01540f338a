"""What is said of ExecuTorch's backends, held to what the installed wheel does."""

import subprocess
import sys

import pytest

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets import executorch_backends
from fastvlm_export.targets.executorch_backends import partitioners, problems
from fastvlm_export.targets.executorch_model import Backend

with quiet_import():
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.extension.pybindings import portable_lib


def test_what_is_offered_runs_here_or_has_an_interpreter() -> None:
    assert [name for name in Backend if not problems(name)] == list(executorch_backends.PROVEN)
    registered = portable_lib._get_registered_backend_names()
    assert "XnnpackBackend" in registered
    assert "CoreMLBackend" not in registered  # tests/validate/test_executorch_coreml.py


def test_vulkan_needs_a_runtime_that_the_wheel_has_not() -> None:
    [line] = problems("vulkan")
    assert line.startswith("--backend vulkan: ")
    assert "EXECUTORCH_BUILD_VULKAN=ON" in line
    assert "VulkanBackend" not in portable_lib._get_registered_backend_names()


def test_qnn_needs_qualcomms_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(executorch_backends.SDK, raising=False)
    [line] = problems("qnn")
    assert "QNN_SDK_ROOT is not set" in line
    monkeypatch.setenv(executorch_backends.SDK, "/opt/qairt")
    [line] = problems("qnn")
    assert "not set" not in line
    assert "--backend xnnpack" in line


def test_an_unknown_backend_and_a_missing_package_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert problems("mps") == [
        "--backend mps: target 'executorch' has xnnpack, portable, coreml, vulkan, qnn"
    ]
    monkeypatch.setattr(executorch_backends, "find_spec", lambda _: None)
    [line] = problems("coreml")
    assert "pip install" in line


def test_asking_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fastvlm_export.targets import executorch_backends as b; "
        "[b.problems(name) for name in b.Backend]; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'executorch', 'coremltools')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_partitioner_of_xnnpack_takes_every_precision() -> None:
    [partitioner] = partitioners(Backend.XNNPACK, "text_decoder")
    linear = partitioner.target_partitioner_configs["linear.default"]
    assert set(linear.enabled_precision_types) == set(ConfigPrecisionType)
    assert not partitioner.per_op_mode  # or every linear layer would be a delegate of its own
    assert partitioners(Backend.PORTABLE, "text_decoder") == []
    with pytest.raises(ValueError, match="coreml"):
        partitioners(Backend.COREML, "text_decoder")
