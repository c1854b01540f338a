"""What the tests of the interpreter share."""

import pytest

from ...shared import once
from ...targets import executorch_toys
from . import recorded


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> recorded.Recorded:
    """All kinds of numbers: 4 and 8 bits, static and per token, and floats."""
    return recorded.read(once(tmp_path_factory, "executorch-recorded", recorded.write))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> executorch_toys.Toy:
    """The one of the tests of targets."""
    return executorch_toys.read_toy(
        once(tmp_path_factory, "executorch-toy", executorch_toys.write_toy)
    )
