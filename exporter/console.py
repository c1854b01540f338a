"""What a user sees while something runs: stages in a terminal or in a log, on stderr."""

import time
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from .progress import Progress, Silent

T = TypeVar("T")

# Progress and errors; stdout is for results.
messages = Console(stderr=True)


class _Bars:
    """Progress in a terminal: a line a stage, with what it is at and how long it has taken."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        """Finish the line of the stage before, begin the next."""
        self.finish()
        self._task = self._bars.add_task(name, total=1, detail="")

    def detail(self, text: str) -> None:
        """Say what the running stage is at."""
        if self._task is not None:
            self._bars.update(self._task, detail=text)

    def finish(self) -> None:
        """Mark the last stage as done."""
        if self._task is not None:
            self._bars.update(self._task, completed=1, detail="")


class _Lines:
    """Progress in a log: a line when a stage starts."""

    def stage(self, name: str) -> None:
        """Print the stage and the time of day."""
        messages.print(f"{time.strftime('%H:%M:%S')}  {name}", highlight=False)

    def detail(self, text: str) -> None:
        """Say nothing: a log is not watched."""


def with_progress(quiet: bool, action: Callable[[Progress], T]) -> T:
    """Run the action with the progress that fits where stderr goes; `quiet`: with none."""
    if quiet:
        return action(Silent())
    if not messages.is_terminal:
        return action(_Lines())
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
    )
    with Bars(*columns, console=messages) as bars:
        progress = _Bars(bars)
        result = action(progress)
        progress.finish()
    return result
