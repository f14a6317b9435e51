"""What a process that works for another one does first."""

import multiprocessing
import os
import signal
import threading

import cv2

from zipir_jax.imageio import raise_pixel_limit


def start_worker(ignored: tuple[int, ...] = (signal.SIGINT,)) -> None:
    """Leave the signals to the parent, use one core, and end with the parent.

    ignored: signals that reach the parent as well, which ends this process in its own time; Ctrl-C is always one.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    raise_pixel_limit()
    cv2.setNumThreads(1)
    # Without this, the workers of a run that is killed would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
