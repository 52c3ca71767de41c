"""How the server is set up, what it has done and what its controller has learned, for `/stats`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from mlxspec._version import __version__
from mlxspec.control.estimates import Learned
from mlxspec.control.records import described_length
from mlxspec.decode.doing import Doing
from mlxspec.defaults import HISTORY, MODEL, PREDICTION
from mlxspec.metrics import RoundStats, counted
from mlxspec.parked import Parked
from mlxspec.serve.core.counts import Counts, Histogram, Routed
from mlxspec.serve.core.measured import Measured
from mlxspec.serve.core.service import Service

_STARTED_S = time.monotonic()


def stats_of(service: Service) -> dict[str, Any]:
    """Everything, as plain values; times in seconds."""
    watch, engine = service.watch, service.worker.engine
    counts, live, plain_s = watch.counts, watch.live(), watch.plain_s()
    return {
        "server": _server(service),
        "now": {
            "ready": service.unready is None,
            "reason": service.unready,
            "running": live.running,
            "waiting": live.waiting,
            "tokens_per_second": round(live.tokens_per_second, 2),
            "acceptance_rate": _rounded(live.acceptance_rate),
        },
        "plain": {
            "seconds": _rounded(plain_s, 6),
            "tokens_per_second": _rounded(1 / plain_s if plain_s else None, 2),
        },
        "measured": _measured(service.worker.measured),
        "requests": _requests(counts),
        "tokens": {
            "prompt": counts.prompt_tokens,
            "cached": counts.cached_tokens,
            "written": counts.written_tokens,
            "written_by": dict(counts.written_by),
        },
        "times": {
            "to_first_token": _mean(counts.first_token_s),
            "between_tokens": _mean(counts.between_s),
            "of_a_text": _mean(counts.whole_s),
        },
        "speculation": _speculation(counts),
        "routing": _routing(service, counts.routed),
        "controller": _controller(watch.latest, service.worker.doing),
        "rounds": _rounds(counts),
        "learned": _learned(engine.learned) if engine is not None else [],
        "cache": live.cache._asdict() if live.cache is not None else None,
    }


def _server(service: Service) -> dict[str, Any]:
    settings, engine = service.settings, service.worker.engine
    tokenizer = engine.tokenizer if engine is not None else None
    limits = ("max_rows", "max_queue", "max_tokens", "max_prompt_tokens", "max_choices")
    return {
        "version": __version__,
        "uptime_s": round(time.monotonic() - _STARTED_S, 1),
        "model": settings.name,
        **settings.about,
        "context": engine.context if engine is not None else None,
        "chats": tokenizer is not None and bool(tokenizer.has_chat_template),
        "drafters": [*engine.drafts, *engine.heads] if engine is not None else [],
        "from_text": bool(engine is not None and engine.texts),
        "compiled": engine.compiles if engine is not None else None,
        "draft_tokens": settings.usual.get("draft_tokens"),
        "needs_key": settings.key is not None,
        **{name: getattr(settings, name) for name in limits},
    }


def _requests(counts: Counts) -> dict[str, Any]:
    answers = sum(counts.calls.values())
    failed = sum(count for (_, status), count in counts.calls.items() if status >= 400)
    return {
        "answered": answers - failed,
        "errors": failed,
        "by_route": [
            {"route": route, "status": status, "count": count}
            for (route, status), count in sorted(counts.calls.items())
        ],
        "texts": counts.texts,
        "cancelled": counts.ended["interrupted"],
        "ended": dict(counts.ended),
    }


def _speculation(counts: Counts) -> dict[str, Any]:
    stats = counts.speculation.as_dict()
    names = ("rounds", "drafted", "accepted", "acceptance_rate", "tokens_per_round")
    more = ("drafted_by_position", "accepted_by_position", "by_source")
    return {name: stats[name] for name in (*names, *more)}


def _routing(service: Service, routed: Routed) -> dict[str, Any] | None:
    """What became of answers that another host might have given; None without such a host."""
    policy = service.settings.upstream
    if policy is None:
        return None
    return {
        "upstream": policy.client.upstream.name,
        "strategy": service.settings.routing,
        **vars(routed),
        "rules": dict(routed.rules),
        "cost": round(routed.cost, 9),
        "saved": round(routed.saved, 9),
        "spilled_share": _rounded(routed.spilled / routed.answers if routed.answers else None),
    }


def _controller(latest: RoundStats | None, choices: Sequence[Doing]) -> dict[str, Any]:
    """What the latest round did, and what was chosen for the texts that share rounds."""
    doing, parked = "no text was written yet", None
    if latest is not None:
        proposes = f"{_named(latest.drafter)} proposes {counted(latest.drafted, 'token')}"
        doing = proposes if latest.drafted else "nothing is proposed"
        parked = _why(latest.parked)
    chosen = [one._asdict() | {"parked": _why(one.parked)} for one in choices]
    return {"doing": doing, "parked": parked, "choices": chosen}


def _named(drafter: str) -> str:
    names = {MODEL: "the draft", HISTORY: "the text so far", PREDICTION: "the expected text"}
    return names.get(drafter, drafter)


def _why(parked: Parked | None) -> str | None:
    if parked is None:
        return None
    return f"{parked.why}; it is tried again in {parked.retry_in} rounds"


def _rounds(counts: Counts) -> list[dict[str, Any]]:
    """The rounds by rows and K: how many parts of texts they wrote, and how long they take."""
    return [
        {
            "rows": rows,
            "draft_tokens": draft_tokens,
            "count": count,
            "seconds": _rounded(counts.usual_s(rows, draft_tokens), 6),
        }
        for (rows, draft_tokens), count in sorted(counts.rows.items())
    ]


def _measured(measured: Measured | None) -> dict[str, Any] | None:
    """The rounds that were timed before the first request."""
    if measured is None:
        return None
    return {
        "plain": _rounded(measured.plain_s, 6),
        "rounds": [
            {
                "draft_tokens": k,
                "draft": _rounded(one.draft_s, 6),
                "verify": _rounded(one.verify_s, 6),
            }
            for k, one in sorted(measured.halves.items())
        ],
    }


def _learned(learned: Learned) -> list[dict[str, Any]]:
    """What is known of each drafter, by the rows of a round and the length of texts."""
    every = {1: learned, **learned.beside}
    return [
        {
            "rows": rows,
            "length": described_length(there),
            "drafter": name,
            "costs": [_rounded(cost, 6) for cost in one.costs],
            "acceptance": [_rounded(rate) for rate in one.acceptance],
        }
        for rows, of_rows in sorted(every.items())
        for there, known in sorted(of_rows.by_length.items())
        for name, one in sorted(known.items())
    ]


def _mean(histogram: Histogram) -> dict[str, Any]:
    count = histogram.count
    return {"count": count, "mean": _rounded(histogram.total_s / count if count else None, 6)}


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
