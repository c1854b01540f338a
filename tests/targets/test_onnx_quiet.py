"""What torch.onnx logs about itself never reaches the terminal; other messages do."""

import importlib.util
import logging
from collections.abc import Iterator

import pytest
import torch

from fastvlm_export.quantize.quiet import quiet_import
from fastvlm_export.targets.onnx_lowering import translate

REGISTRATION = logging.getLogger("torch.onnx._internal.exporter._registration")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """Messages that the logger hands on."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    REGISTRATION.addHandler(handler)
    yield messages
    REGISTRATION.removeHandler(handler)


def test_lowering_is_silent_where_torchvision_is_missing(
    monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    find_spec = importlib.util.find_spec
    asked = []

    def without_torchvision(name: str, package: str | None = None) -> object:
        asked.append(name)
        return None if name == "torchvision" else find_spec(name, package)

    program = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))
    monkeypatch.setattr(importlib.util, "find_spec", without_torchvision)
    model = translate(program, {}, 23)
    assert "torchvision" in asked, "torch.onnx no longer looks for it: drop this test"
    assert len(list(model.graph)) > 0
    assert heard == []


def test_other_messages_pass(heard: list[str]) -> None:
    with quiet_import():
        REGISTRATION.warning("torchvision is not installed. Skipping %s", "torchvision::nms")
        REGISTRATION.warning("another message")
    REGISTRATION.warning("torchvision is not installed. Skipping %s", "after")
    assert heard == ["another message", "torchvision is not installed. Skipping after"]
