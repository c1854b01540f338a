"""What is said of a package that cannot be run."""

from pathlib import Path

from ...exporter.errors import ExportError

EXPORT_AGAIN = "export it again: fastvlm-export --target coreml"


def damaged(path: Path, what: str) -> ExportError:
    """A file of a package that is not as its package says."""
    return ExportError(f"{path} {what}", EXPORT_AGAIN)


def foreign(path: Path, what: str) -> ExportError:
    """A package that is sound, but nothing the interpreter runs."""
    return ExportError(
        f"{path} {what}",
        "name a package of ML programs, as `fastvlm-export --target coreml` writes",
    )
