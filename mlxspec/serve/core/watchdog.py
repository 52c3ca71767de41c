"""Says so when a round does not end."""

from __future__ import annotations

import asyncio

from mlxspec.metrics import Tell
from mlxspec.serve.core.worker import Worker

LOOKS_EVERY_S = 1.0


async def watch_over(worker: Worker, stuck_s: float, tell: Tell) -> None:
    """Look after a worker for ever: tell once when a round takes too long, and when it has ended.

    Args:
        stuck_s: seconds after which a round takes too long.
    """
    longest_s = 0.0  # of the round that takes too long
    while True:
        await asyncio.sleep(min(LOOKS_EVERY_S, stuck_s / 4))
        still_s = worker.still_s
        if still_s > stuck_s:
            if not longest_s:
                tell(
                    f"A round has not ended for {still_s:.0f} s. The server calls itself not ready "
                    "until it does; if it never does, start the server again."
                )
            longest_s = still_s
        elif longest_s:
            tell(f"The round that did not end has ended after at least {longest_s:.0f} s.")
            longest_s = 0.0
