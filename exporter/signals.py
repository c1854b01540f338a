"""Being told to end: SIGTERM and SIGHUP unwind as Ctrl-C does, so that everything is cleaned up."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .console import messages

_NAMES = ("SIGTERM", "SIGHUP")


class Terminated(SystemExit):
    """A signal told this process to end; `name` is the signal's, the exit code 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def end_on_signals() -> Iterator[None]:
    """Within, those signals raise `Terminated`, and one line says so when everything is unwound.

    One that is ignored, as under `nohup`, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change what a signal does
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _raise)
    try:
        yield
    except Terminated as ended:
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            messages.print(f"Ended by {ended.name}.", highlight=False)
        raise
    finally:
        for number in taken:
            with contextlib.suppress(ValueError):
                signal.signal(number, signal.SIG_DFL)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
