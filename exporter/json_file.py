"""JSON files that somebody else wrote: read with types and bounds, problems collected.

Nothing here raises for bad content: each problem becomes one line in a list, so that a user sees
all of them at once.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Never

LARGEST_SIZE = 2**31 - 1
LARGEST_NUMBER = 1e12
LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is git-lfs's stand-in for the real one."""
    with path.open("rb") as file:
        return file.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not a JSON number")


class Section:
    """One JSON object. `where` names it in problems, for example "config.json: text_config"."""

    def __init__(self, values: Mapping[str, object], where: str, problems: list[str]) -> None:
        self.values = values
        self.where = where
        self.problems = problems

    def __contains__(self, key: str) -> bool:
        """Whether `key` is there with a value other than null."""
        return self.values.get(key) is not None

    def complain(self, key: str, wanted: str) -> None:
        """Add "where: key is value, not wanted" to the problems."""
        shown = json.dumps(self.values.get(key))
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        self.problems.append(f"{self.where}: {key} is {shown}, not {wanted}")

    def integer(self, key: str, *, low: int = 1, high: int = LARGEST_SIZE) -> int | None:
        """A whole number in low..high, or None where it is absent or wrong."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.complain(key, f"a whole number from {low} to {high}")
            return None
        return value

    def number(self, key: str) -> float | None:
        """A number in 0..1e12 without zero, or None where it is absent or wrong."""
        value = self.values.get(key)
        if value is None:
            return None
        number = 0.0 if isinstance(value, bool) or not isinstance(value, int | float) else value
        if 0 < number <= LARGEST_NUMBER:  # false for NaN
            return float(number)
        self.complain(key, f"a number above zero, {LARGEST_NUMBER:g} at most")
        return None

    def flag(self, key: str) -> bool | None:
        """True or false, or None where it is absent or wrong."""
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.complain(key, "true or false")
        return None

    def text(self, key: str) -> str | None:
        """A string, or None where it is absent or wrong."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        self.complain(key, "a string")
        return None

    def section(self, key: str) -> "Section":
        """The object under `key`, empty where it is absent or wrong."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.complain(key, "an object")
        where = f"{self.where}: {key}" if self.where.endswith(".json") else f"{self.where}.{key}"
        return Section(value if isinstance(value, dict) else {}, where, self.problems)

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """A list of finite numbers, or None where it is absent or wrong."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, Sequence) and not isinstance(value, str):
            plain = [x for x in value if isinstance(x, int | float) and not isinstance(x, bool)]
            if len(plain) == len(value) and all(abs(x) <= LARGEST_SIZE for x in plain):
                return tuple(float(x) for x in plain)
        self.complain(key, "a list of numbers")
        return None

    def only(self, key: str, allowed: Sequence[object], why: str) -> None:
        """Complain where `key` has a value outside `allowed` (None: absent or null is fine)."""
        value = self.values.get(key)
        if value is not None and not any(
            value == choice and isinstance(value, bool) == isinstance(choice, bool)
            for choice in allowed
        ):
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            self.complain(key, f"{choices}: {why}")

    def agree(self, key: str, found: int | None, what: str) -> None:
        """Complain where `key` states another size than the tensors have."""
        stated = self.integer(key, low=0)
        if stated is not None and found is not None and stated != found:
            self.problems.append(f"{self.where}: {key} is {stated}, but {what} {found}")


def read_json(path: Path, problems: list[str]) -> Section:
    """The object in a JSON file, empty with a problem noted where it cannot be read."""
    try:
        values = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        if isinstance(values, dict):
            return Section(values, path.name, problems)
        problems.append(f"{path.name} holds a {type(values).__name__}, not a JSON object")
    except (ValueError, RecursionError) as error:
        if is_lfs_pointer(path):
            problems.append(f"{path.name} is a git-lfs pointer, not the file itself")
        else:
            problems.append(f"{path.name} is not valid JSON: {error}")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    return Section({}, path.name, problems)


def read_json_if_there(folder: Path, name: str, problems: list[str]) -> Section:
    """As `read_json`, and an empty object where there is no such file."""
    path = folder / name
    return read_json(path, problems) if path.exists() else Section({}, name, problems)
