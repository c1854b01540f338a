"""Call torchao, coremltools and torch.onnx without the lines that they log about themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Logger -> what marks the lines that say nothing about this run: CUDA kernels that a CPU wheel
# cannot load, a deprecation between torchao and torch, versions of what coremltools' own
# converters read (ours are not among them), Apple's frameworks, which only a Mac has, and operators
# of torchvision, which no graph of ours holds.
_CHATTER = {
    "torchao": ("Failed to load",),
    "torch.utils._pytree": ("is an Enum subclass",),
    "torch.onnx._internal.exporter._registration": ("torchvision is not installed",),
    "coremltools": (
        "Failed to load _ML",
        "has not been tested with coremltools",
        "Disabling scikit-learn conversion API",
    ),
}


@contextmanager
def quiet_import() -> Iterator[None]:
    """Drop known start-up messages; every other message, and every error, passes.

    `with quiet_import(): from torchao import ...`. The first import of a process is the one that
    prints, so every import of torchao or coremltools (which imports torchao) goes through here.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return not any(mark in str(record.msg) for mark in _CHATTER[record.name])

    loggers = [logging.getLogger(name) for name in _CHATTER]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
