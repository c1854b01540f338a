"""Which files of tests run on one worker, as they share what is long in the making."""

GROUPS = {
    "tensorrt": (
        "exporter/test_tensorrt_cli.py",
        "targets/test_tensorrt_exact.py",
        "targets/test_tensorrt_inspect.py",
        "targets/test_tensorrt_lowering.py",
        "targets/test_tensorrt_older.py",
        "targets/test_tensorrt_session.py",
        "targets/test_tensorrt_session_errors.py",
        "validate/test_tensorrt_stored.py",
    ),
    "executorch": (
        "exporter/test_executorch_cli.py",
        "targets/test_executorch_runner.py",
        "targets/test_executorch_stored.py",
        "targets/test_executorch_vision.py",
    ),
    "onnx": (
        "exporter/test_cli.py",
        "exporter/test_pipeline.py",
        "targets/test_onnx.py",
        "targets/test_onnx_exact.py",
        "targets/test_onnx_layers.py",
        "targets/test_onnx_recipe_bundles.py",
        "targets/test_onnx_stored.py",
        "targets/test_transformers_js.py",
    ),
    "pte": (
        "validate/pte/test_faults.py",
        "validate/pte/test_program.py",
        "validate/pte/test_refusals.py",
    ),
    "coreml": (
        "targets/test_coreml.py",
        "validate/test_stored.py",
    ),
    "halves": (
        "quantize/test_bfloat16.py",
        "quantize/test_exact.py",
        "quantize/test_fp8.py",
        "quantize/test_half.py",
        "quantize/test_half_integers.py",
        "quantize/test_symmetric.py",
    ),
    "faults": ("exporter/test_coreml_faults.py",),
}
"""Files below `tests`; the longest group first, as it is begun. Any other file is one by itself."""

OF = {f"tests/{file}": name for name, files in GROUPS.items() for file in files}


def group(nodeid: str) -> str:
    """The group of a test: its file's, or its file."""
    file = nodeid.partition("::")[0]
    return OF.get(file, file)


def place(nodeid: str) -> int:
    """When the test's group is begun."""
    return [*GROUPS, group(nodeid)].index(group(nodeid))
