"""Signals that ask a process to end unwind it as Ctrl-C does."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fastvlm_export.exporter.signals import Terminated, end_on_signals

SIGNALS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _as_at_a_terminal() -> Iterator[None]:
    """Where the tests themselves run under `nohup`, one is ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_unwinds_says_one_line_and_gives_its_exit_code(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    unwound = []
    with pytest.raises(Terminated) as caught, end_on_signals():
        try:
            os.kill(os.getpid(), number)
        finally:
            unwound.append(number)
    assert unwound == [number]
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == f"Ended by {number.name}.\n"
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_ignored(number: signal.Signals) -> None:
    """As under `nohup`."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with end_on_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_another_thread_changes_nothing() -> None:
    seen = []

    def run() -> None:
        with end_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
