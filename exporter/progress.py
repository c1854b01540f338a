"""What long work says while it runs."""

from typing import Protocol


class Progress(Protocol):
    """Told of each stage as it starts, and of what it is at."""

    def stage(self, name: str) -> None:
        """A stage starts; the one before it has ended."""
        ...

    def detail(self, text: str) -> None:
        """What the running stage is at."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        """Say nothing."""

    def detail(self, text: str) -> None:
        """Say nothing."""
