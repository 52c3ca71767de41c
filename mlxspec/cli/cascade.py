"""The options of an upstream beside the local model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mlxspec.errors import UsageError, nearest
from mlxspec.files import expanded
from mlxspec.pairs.table import Pair

if TYPE_CHECKING:
    from mlxspec.cascade.cascade import Cascade, Policy
    from mlxspec.cascade.rules import Thresholds
    from mlxspec.cascade.upstreams import Upstreams
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.request import Request
    from mlxspec.serve.core.settings import Strategy

_upstream = partial(typer.Option, rich_help_panel="Upstream")


@dataclass(frozen=True, kw_only=True)
class UpstreamOptions:
    """Another host that answers where the local answer is doubtful."""

    upstream: Annotated[
        str | None,
        _upstream(
            metavar="NAME",
            help="An upstream of the table. It is asked where a rule doubts the beginning of the "
            "local answer, and its answer is used where the two differ: the result is not exact. "
            "Other hosts then see the prompt.",
        ),
    ] = None
    upstreams: Annotated[
        Path | None,
        _upstream(
            metavar="FILE",
            help="The table of upstreams; by default upstreams.toml in the user's configuration.",
        ),
    ] = None
    probe_tokens: Annotated[
        int | None,
        _upstream(
            min=1,
            help="Tokens of the local answer that the rules judge: 10, or the table's, by default.",
        ),
    ] = None
    min_confidence: Annotated[
        float | None,
        _upstream(
            min=0,
            max=1,
            help="The similarity of both answers from which the local one is used: 0.8, or the "
            "table's, by default.",
        ),
    ] = None
    no_rule: Annotated[
        list[str] | None,
        _upstream(metavar="NAME", help="A rule that is not asked; repeatable."),
    ] = None

    def require_place(self, **others: object) -> None:
        """Raise UsageError where options do not go together.

        Args:
            others: what was given of the options that an upstream does not go with, by name.
        """
        own = {
            "--upstreams": self.upstreams,
            "--probe-tokens": self.probe_tokens,
            "--min-confidence": self.min_confidence,
            "--no-rule": self.no_rule,
        }
        if self.upstream is None:
            for name in (name for name, given in own.items() if given is not None):
                raise UsageError(
                    f"{name} says nothing without --upstream.", hint="Add --upstream NAME."
                )
            return
        for name in (name for name, given in others.items() if given):
            raise UsageError(
                f"{name} does not go with --upstream {self.upstream}.", hint="Leave one out."
            )

    def policy(self) -> Policy | None:
        """The upstream and when it is asked; None where there is none.

        Raises:
            UsageError: the table has no such upstream, the environment no key for it, or there is
            no such rule. TableError: the table cannot be used.
        """
        if self.upstream is None:
            return None
        from mlxspec.cascade.cascade import Policy
        from mlxspec.cascade.client import Client

        client = Client(self._table().named(self.upstream))
        return Policy(client, *self.rules())

    def rules(self) -> tuple[Thresholds, frozenset[str]]:
        """The thresholds, and the names of rules that are off; those of the table, if there is one.

        Raises:
            UsageError: there is no such rule. TableError: the table cannot be used.
        """
        from mlxspec.cascade.rules import Thresholds
        from mlxspec.cascade.upstreams import user_upstreams

        there = self.upstreams is not None or user_upstreams().exists()
        thresholds = self._table().thresholds if there else Thresholds()
        changes: dict[str, Any] = {
            "max_draft_tokens": self.probe_tokens,
            "min_confidence": self.min_confidence,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(thresholds, **given), self._off()

    def _table(self) -> Upstreams:
        from mlxspec.cascade.upstreams import load_upstreams

        return load_upstreams(None if self.upstreams is None else expanded(self.upstreams))

    def _off(self) -> frozenset[str]:
        from mlxspec.cascade.rules import RULES

        for name in self.no_rule or ():
            if name not in RULES:
                near = nearest(name, RULES)
                hint = f"Did you mean {near}?" if near else f"The rules are {', '.join(RULES)}."
                raise UsageError(f"There is no rule named {name!r}.", hint=hint)
        return frozenset(self.no_rule or ())


STRATEGIES = ("local", "speculative_decoding", "upstream")


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """Who answers the requests of a server that name nobody."""

    routing: Annotated[
        str | None,
        _upstream(
            metavar="|".join(STRATEGIES),
            help="Who answers requests that do not say: the local model, which is the default; "
            "the local model first and the upstream where a rule asks for it; or the upstream.",
        ),
    ] = None

    def strategy(self, upstream: UpstreamOptions) -> Strategy:
        """The strategy; raises UsageError where it is none, or has no upstream."""
        if self.routing not in (None, *STRATEGIES):
            near = nearest(self.routing or "", STRATEGIES)
            hint = f"Did you mean {near}?" if near else f"It takes {', '.join(STRATEGIES)}."
            raise UsageError(f"--routing {self.routing} is no strategy.", hint=hint)
        if self.routing not in (None, "local") and upstream.upstream is None:
            raise UsageError(
                f"--routing {self.routing} has no upstream.", hint="Add --upstream NAME."
            )
        return cast("Strategy", self.routing or "local")


def cascade_of(
    policy: Policy,
    engine: Engine,
    request: Request,
    prompt: str,
    texts: Mapping[str, Any],
    pair: Pair,
) -> Cascade:
    """A request with an upstream behind it, which gets the prompt as turns.

    Args:
        texts: the system message among them.
    """
    from mlxspec.cascade.cascade import Cascade
    from mlxspec.cascade.client import Question, turns_of

    turns = turns_of(texts.get("system"), prompt)
    question = Question.of(turns, request.limit - len(request.tokens), request)
    return Cascade(policy, engine, request, question, pair.target_name)
