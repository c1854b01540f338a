"""The command line as a user calls it: in this process by the fixture `run`, or in another."""

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def command(*arguments: object, questions: int | None = None) -> list[str]:
    """`questions`: how many of the bundled task are asked; None: as many as a user has."""
    # A test run in the background has interrupts ignored, and so have its children.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from fastvlm_export.exporter.cli import main;"
    )
    if questions is not None:
        program += f"from fastvlm_export.validate import proof; proof.QUESTIONS = {questions};"
    program += "main()"
    return [sys.executable, "-c", program, *map(str, arguments)]


def bad(result: Result, *words: str) -> None:
    """One clear error: exit code 2, on stderr, no traceback, nothing on stdout."""
    assert result.code == 2
    assert "Traceback" not in result.err
    assert not result.out
    for word in words:
        assert word in result.err
