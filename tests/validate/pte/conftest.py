"""What the tests of the interpreter share."""

import pytest

from ...shared import once
from . import recorded


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> recorded.Recorded:
    """A small random model of every kind of numbers, for all workers."""
    return recorded.read(once(tmp_path_factory, "executorch-recorded", recorded.write))
