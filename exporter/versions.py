"""Installed versions, and which of them lie outside the ranges this package was tested with.

The ranges are those of the distribution's own metadata, so they cannot differ from pyproject.toml.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

DISTRIBUTION = "fastvlm-export"
DEVELOPMENT = "dev"
"""The extra that a user has no need of."""

UNKNOWN = "unknown"
"""The version of a module that no installed distribution claims."""


@dataclass(frozen=True, kw_only=True)
class Untested:
    """An installed package whose version was not tested, and the range that was."""

    package: str
    installed: str
    tested: str

    @property
    def remedy(self) -> str:
        """The command that installs a tested version."""
        return f"pip install '{self.package}{self.tested}'"

    def to_dict(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self) | {"remedy": self.remedy}


def version_of(module: str) -> str:
    """The version of the distribution that provides a module, "unknown" where none does.

    Distributions are not always called like their module: `onnxruntime` also comes as
    `onnxruntime-gpu`.
    """
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        names = _distributions().get(module, ())
        return metadata.version(names[0]) if names else UNKNOWN


def untested(
    extras: Collection[str] | None = None,
    *,
    requirements: Sequence[str] | None = None,
    installed: Callable[[str], str | None] | None = None,
) -> list[Untested]:
    """Installed packages outside their tested range, by name; packages that are absent are not.

    Args:
        extras: consider what every installation needs and these extras; None: all but "dev".
        requirements: lines such as "onnx>=1.20,<2; extra == 'onnx'"; None: this distribution's own,
            and none where it was never installed.
        installed: name of a distribution -> its version, None where it is absent.

    """
    lines = _requirements() if requirements is None else requirements
    look_up = installed or _installed
    found: dict[str, Untested] = {}
    for needed in _needed(lines, extras):
        version = look_up(needed.name)
        if version is not None and not _is_tested(needed, version):
            found[needed.name] = Untested(
                package=needed.name, installed=version, tested=_range(needed)
            )
    return [found[name] for name in sorted(found)]


def _needed(lines: Sequence[str], extras: Collection[str] | None) -> Iterator[Requirement]:
    parsed = [Requirement(line) for line in lines]
    if extras is None:
        named = (re.findall(r"extra\s*==\s*['\"]([^'\"]+)", line) for line in lines)
        extras = {extra for found in named for extra in found} - {DEVELOPMENT}
    for one in parsed:
        environments: list[dict[str, str]] = [{"extra": extra} for extra in ("", *extras)]
        if one.marker is None or any(map(one.marker.evaluate, environments)):
            yield one


def _is_tested(needed: Requirement, version: str) -> bool:
    try:
        return needed.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _range(needed: Requirement) -> str:
    """The lower bound first."""
    return ",".join(sorted(map(str, needed.specifier), reverse=True))


def _requirements() -> Sequence[str]:
    try:
        return metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return ()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        module = name.replace("-", "_")
        return version_of(module) if find_spec(module) else None


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())
