"""Import torchao without the lines that it prints about itself."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Logger -> what marks the lines that say nothing about this run: CUDA kernels that a CPU
# wheel cannot load, and a deprecation between torchao and torch.
_CHATTER = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
}


@contextmanager
def quiet_import() -> Iterator[None]:
    """Drop torchao's two known start-up messages; every other message, and every error, passes.

    `with quiet_import(): from torchao import ...`. The first import of a process is the one that
    prints, so every import of torchao goes through here.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return _CHATTER[record.name] not in str(record.msg)

    loggers = [logging.getLogger(name) for name in _CHATTER]
    for logger in loggers:
        logger.addFilter(wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(wanted)
