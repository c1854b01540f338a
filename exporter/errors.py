"""The one exception that a user is expected to meet."""


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
