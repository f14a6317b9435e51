import signal
import threading

import pytest

from zipir_jax.signals import delayed_signals

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_waits_and_the_second_acts(number):
    before = [signal.getsignal(n) for n in BOTH]
    seen = []
    signal.signal(number, lambda *_: seen.append("acted"))
    try:
        with delayed_signals() as received:
            signal.raise_signal(number)
            assert (received, seen) == ([number], [])
            signal.raise_signal(number)
            assert (received, seen) == ([number], ["acted"])
    finally:
        signal.signal(number, before[BOTH.index(number)])
    assert [signal.getsignal(n) for n in BOTH] == before


def test_handlers_return_after_an_error():
    before = [signal.getsignal(n) for n in BOTH]
    with pytest.raises(ValueError, match="inside"), delayed_signals() as received:
        assert [signal.getsignal(n) for n in BOTH] != before
        raise ValueError("inside")
    assert received == []
    assert [signal.getsignal(n) for n in BOTH] == before


def test_other_threads_run_without():
    before = [signal.getsignal(n) for n in BOTH]
    inside = []

    def work():
        with delayed_signals() as received:
            inside.append((list(received), [signal.getsignal(n) for n in BOTH]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [([], before)]
