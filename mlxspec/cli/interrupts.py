"""Ctrl-C is answered within half a second, also while MLX computes and Python cannot listen.

Python runs its handler of a signal between two steps of its own. A pass of a large model, or the
compiler that MLX starts for a kernel, is one such step and takes seconds. A thread hears of the
signal at once; where Python has not raised KeyboardInterrupt after a while, it ends the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mlxspec.defaults import INTERRUPTED

PATIENCE_S = 0.35

_leaving: list[Callable[[], object]] = []


@contextmanager
def leaving(last_words: Callable[[], object]) -> Iterator[None]:
    """While the block runs, `last_words` is called where Ctrl-C must end the process at once.

    Another thread calls it, while the main one waits for MLX.
    """
    _leaving.append(last_words)
    try:
        yield
    finally:
        _leaving.remove(last_words)


@contextmanager
def answered() -> Iterator[None]:
    """While the block runs, Ctrl-C is answered at once; a process that ignores it goes on doing so.

    For the main thread; elsewhere it changes nothing.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    hearing, speaking = os.pipe()
    os.set_blocking(speaking, False)
    heard = threading.Semaphore(0)

    def handler(number: int, frame: object) -> None:
        heard.release()
        raise KeyboardInterrupt

    before = signal.set_wakeup_fd(speaking, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, handler)
    listener = threading.Thread(target=_listen, args=(hearing, heard), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(before)
        os.close(speaking)  # ends the listener
        listener.join()
        os.close(hearing)


@contextmanager
def handed_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block runs, `handler` gets Ctrl-C and SIGTERM, in place of all that is above.

    For the main thread; elsewhere it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    listening = signal.set_wakeup_fd(-1)
    before = {one: signal.signal(one, handler) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
        signal.set_wakeup_fd(listening, warn_on_full_buffer=False)


def _listen(hearing: int, heard: threading.Semaphore) -> None:
    """Wait for signals; each must be heard by the main thread in time."""
    while number := os.read(hearing, 1):
        if number[0] == signal.SIGINT and not heard.acquire(timeout=PATIENCE_S):
            _leave()


def _leave() -> None:
    """Say what is to be said, and end the process."""
    with suppress(Exception):  # whatever it is, the person wants to be gone
        for last_words in _leaving[-1:]:
            last_words()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(INTERRUPTED)
