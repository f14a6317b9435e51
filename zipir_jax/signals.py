"""Ctrl-C and SIGTERM (what a scheduler sends before it takes the machine) while a step runs."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def delayed_signals() -> Iterator[list[int]]:
    """Within it, the first SIGINT or SIGTERM only enters the list that it yields; a second one acts as ever.

    Afterwards both act as before. Outside the main thread, where Python allows no handlers, the list stays empty.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number, frame):
        received.append(number)
        restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
