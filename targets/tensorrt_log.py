"""What TensorRT says, and what it calls its types: shared by what builds engines and runs them."""

from types import ModuleType
from typing import Any

TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's element types -> the graphs' names for them."""


class Log:
    """TensorRT's messages: errors are kept, the rest is dropped. `made` is what TensorRT takes."""

    NOISE = ("Thread context has not been set",)
    """Said of messages that come from another thread than TensorRT expects; nothing is wrong."""

    def __init__(self, package: ModuleType) -> None:
        errors: list[str] = []

        class Logger(package.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                package.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= package.ILogger.ERROR and not message.startswith(Log.NOISE):
                    errors.append(message.strip())

        self.errors = errors
        self.made = Logger()

    @property
    def first(self) -> str:
        """The first line of the first error, shortened."""
        lines = (self.errors or ["it gave no reason"])[0].splitlines()
        return lines[0].strip()[:300]

    def take(self) -> str:
        """The first line of each error since the last call, each once; empty where none was."""
        lines = [error.splitlines()[0].strip()[:300] for error in self.errors if error]
        self.errors.clear()
        return "; ".join(dict.fromkeys(lines))


def type_name(dtype: Any) -> str:
    """TensorRT's element type as the graphs call it."""
    return TYPES.get(dtype.name, str(dtype.name).lower())
