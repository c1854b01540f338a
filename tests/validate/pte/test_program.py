"""A program computed from its file is the quantized model computed without rounding."""

from .recorded import STAGES, Recorded

LIMIT = 3e-6  # of a stage's largest number; several times what is seen


def test_every_stage_is_the_model_s(small: Recorded) -> None:
    found = small.differences()
    assert tuple(found) == STAGES
    assert found["embeds"] == 0
    assert max(found.values()) <= LIMIT, found
