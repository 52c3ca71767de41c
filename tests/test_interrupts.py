"""Ctrl-C is answered at once, whether Python can listen or a library keeps it waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mlxspec.cli import interrupts

# A computation that lets no signal through, as MLX's are, and one that does.
DEAF = "hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)"
LISTENING = "time.sleep(60)"
PROGRAM = """
import hashlib, sys, time
from mlxspec.cli.interrupts import answered, leaving
try:
    with answered(), leaving(lambda: print("last words")):
        print("ready", flush=True)
        {work}
except KeyboardInterrupt:
    print("heard")
    sys.exit(130)
"""


@pytest.mark.parametrize(("work", "said"), [(DEAF, "last words"), (LISTENING, "heard")])
def test_a_person_is_answered_within_half_a_second(work: str, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(work=work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.5)  # until it works, which nothing else tells
        started = time.monotonic()
        child.send_signal(signal.SIGINT)
        rest = child.stdout.read()
    assert rest == f"{said}\n"
    assert child.returncode == 130
    # Half a second on a machine that is not busy with other tests. The work takes a minute.
    assert interrupts.PATIENCE_S <= 0.5
    assert time.monotonic() - started < 20


def test_every_signal_is_heard_and_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    monkeypatch.setattr(interrupts, "_leave", lambda: ended.append(True))
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))  # noqa: PTH208
    with interrupts.answered():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        time.sleep(interrupts.PATIENCE_S + 0.1)
    assert not ended
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads
    assert len(os.listdir("/dev/fd")) == files  # noqa: PTH208


def test_a_process_that_ignores_it_goes_on_doing_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.answered():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
