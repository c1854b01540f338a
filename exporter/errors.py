"""The one exception that a user is expected to meet."""

from collections.abc import Sequence


class ExportError(Exception):
    """Something about the request or its inputs is wrong; the user can fix it.

    `message` says what is wrong, `hint` the next command to run or what to change. Anything else
    that is raised is a bug and keeps its traceback.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def raise_together(problems: Sequence[ExportError]) -> None:
    """Raise all that is wrong as one error, each hint once; nothing where there are none."""
    if problems:
        raise ExportError(
            "\n".join(error.message for error in problems),
            "\n".join(dict.fromkeys(error.hint for error in problems if error.hint)),
        )
