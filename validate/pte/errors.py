"""What the interpreter says about programs that it cannot compute."""

from ...exporter.errors import ExportError
from ...targets.executorch_model import EXPORT_HINT

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError, NotImplementedError)
"""What PyTorch raises for operands that an operator does not take."""


class RefusedError(ValueError):
    """What is wrong with a step, or beyond the interpreter. `refused` turns it into ExportError."""


def refused(where: str, reason: object) -> ExportError:
    """The one error of a program that cannot be computed: `where` names the file and the step."""
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return ExportError(f"{where} cannot be computed without rounding: {lines[0]}", EXPORT_HINT)
