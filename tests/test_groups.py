from collections import Counter
from pathlib import Path

from .groups import GROUPS, group, place

TESTS = Path(__file__).parent


def test_groups_name_files_that_are_there_once() -> None:
    files = [file for files in GROUPS.values() for file in files]
    assert [file for file in files if not (TESTS / file).is_file()] == []
    assert max(Counter(files).values()) == 1


def test_the_longest_groups_come_first_and_any_other_file_is_one() -> None:
    first, *_, last = GROUPS
    assert group(f"tests/{GROUPS[first][0]}::test_it[a::b]") == first
    assert group("tests/quantize/test_ops.py::test_it") == "tests/quantize/test_ops.py"
    places = [place(f"tests/{GROUPS[name][-1]}::test_it") for name in (first, last)]
    assert places == [0, len(GROUPS) - 1]
    assert place("tests/quantize/test_ops.py::test_it") == len(GROUPS)
