"""How long each stage took."""

import time

from .progress import Progress


class Clock:
    """Passes stages on to a Progress and times them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._started: float | None = None
        self._name = ""
        self._seconds: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """Start a stage, ending the one before."""
        self._end()
        self._name, self._started = name, time.perf_counter()
        self._progress.stage(name)

    def detail(self, text: str) -> None:
        """Say what the running stage is at."""
        self._progress.detail(text)

    def seconds(self) -> dict[str, float]:
        """Stage -> seconds so far; ends the running stage."""
        self._end()
        return dict(self._seconds)

    def _end(self) -> None:
        if self._started is not None:
            spent = time.perf_counter() - self._started
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent
            self._started = None
