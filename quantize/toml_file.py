"""TOML files that somebody wrote: read with types and bounds, problems collected."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..exporter.errors import ExportError

T = TypeVar("T")
C = TypeVar("C", bound=str | int)
D = TypeVar("D")

LARGEST_FILE = 2**20
"""Bytes. A rule for each layer of the 7B takes about 60 KB."""

LONGEST_SHOWN = 60
LISTED_FILES = 10
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def either(values: Iterable[object]) -> str:
    """`16, 32 or 64`; there must be one."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def shown(value: object) -> str:
    """A value as TOML writes it, cut where it is long; plain ASCII, whatever it holds."""
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits, nesting
        return f"a very large {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."


def meant(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name.lower(), tuple(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


class Table:
    """One TOML table. `key` names it in problems, for example `decoder`; empty: the file itself.

    Each getter gives `default` where its key is absent, and where it is wrong, which is noted.
    """

    def __init__(self, values: Mapping[str, object], key: str, problems: list[str]) -> None:
        self.values = values
        self.key = key
        self.problems = problems

    def __contains__(self, name: str) -> bool:
        """Whether the file has that key here, right or wrong."""
        return name in self.values

    def name(self, name: str) -> str:
        """The full key, `decoder.group_size`."""
        plain = name if _BARE_KEY.fullmatch(name) else shown(name)
        return f"{self.key}.{plain}" if self.key else plain

    def complain(self, name: str, problem: str) -> None:
        """Note "table.key problem"."""
        self.problems.append(f"{self.name(name)} {problem}")

    def only(self, names: Sequence[str]) -> None:
        """Complain of every key but these."""
        known = ", ".join(names)
        for name in self.values:
            if name not in names:
                self.complain(name, f"is no key.{meant(name, names) or f' There are: {known}.'}")

    def _take(self, name: str, wanted: str, default: D, take: Callable[[object], T]) -> T | D:
        """The key's value as `take` understands it; `take` raises ValueError for a wrong one."""
        if name not in self.values:
            return default
        try:
            return take(self.values[name])
        except ValueError:
            self.complain(name, f"is {shown(self.values[name])}, not {wanted}")
            return default

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""

        def take(value: object) -> bool:
            if isinstance(value, bool):
                return value
            raise ValueError

        return self._take(name, "true or false", default, take)

    def text(self, name: str, default: str, pattern: re.Pattern[str], wanted: str) -> str:
        """A string that is `wanted`: one that the pattern matches as a whole."""

        def take(value: object) -> str:
            if isinstance(value, str) and pattern.fullmatch(value):
                return value
            raise ValueError

        return self._take(name, wanted, default, take)

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """A number from low to high."""

        def take(value: object) -> float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError
            if low <= value <= high:  # false for NaN
                return float(value)
            raise ValueError

        return self._take(name, f"a number from {low:g} to {high:g}", default, take)

    def choice(self, name: str, options: Sequence[C], default: D, why: str = "") -> C | D:
        """One of the options, strings or whole numbers; `why` there are no others."""

        def take(value: object) -> C:
            plain = isinstance(value, str | int) and not isinstance(value, bool)
            for option in options:
                if plain and value == option:
                    return option
            raise ValueError

        return self._take(name, " or ".join(map(shown, options)) + why, default, take)

    def count_or(self, name: str, word: str, high: int, default: int | None) -> int | None:
        """A whole number from 1 to `high`, or None where the file has `word`."""

        def take(value: object) -> int | None:
            if value == word:
                return None
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high:
                return value
            raise ValueError

        return self._take(name, f"{shown(word)} or a whole number from 1 to {high}", default, take)

    def table(self, name: str) -> "Table":
        """The table of that name, empty where it is absent or wrong."""

        def take(value: object) -> Table:
            if isinstance(value, dict):
                return Table(value, self.name(name), self.problems)
            raise ValueError

        return self._take(
            name, f"a table: [{name}]", Table({}, self.name(name), self.problems), take
        )

    def tables(self, name: str) -> tuple["Table", ...]:
        """The tables that the file repeats under that name, numbered from 1."""

        def take(value: object) -> tuple[Table, ...]:
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise ValueError
            keys = (f"{self.name(name)}[{number}]" for number in range(1, len(value) + 1))
            return tuple(
                Table(one, key, self.problems) for one, key in zip(value, keys, strict=True)
            )

        return self._take(name, f"tables: [[{name}]]", (), take)


def read_toml(path: Path, what: str) -> dict[str, object]:
    """The file's content. Raises ExportError, which calls it `what`, where it can't be read."""
    try:
        if path.is_dir():
            raise ExportError(f"{path} is a folder, not a {what}.", f"Give the {what} in it.")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        there = sorted(one.name for one in path.parent.glob("*.toml"))
        raise ExportError(
            f"There is no {what} {path}.{meant(path.name, there)}",
            f"TOML files in {path.parent}: {', '.join(there[:LISTED_FILES]) or 'none'}.",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ExportError(f"{path} cannot be read: {why}.", f"Give a {what}.") from None
    problem = f"is larger than {LARGEST_FILE} bytes"
    if len(content) <= LARGEST_FILE:
        try:
            return tomllib.loads(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start})"
        except ValueError as error:
            problem = f"is not TOML: {error}"
        except RecursionError:
            problem = "is nested too deeply"
    raise ExportError(f"{path} {problem}.", f"Correct it: a {what} is a text file in TOML.")
