"""The options of `mlxspec bench` for other programs on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from mlxspec.errors import UsageError, nearest

if TYPE_CHECKING:
    from mlxspec.bench.arms import OwnArm
    from mlxspec.bench.measuring import PeerArm

_peer = partial(typer.Option, rich_help_panel="Other programs", show_default=False)
_PROGRAMS = ("mlx-lm",)


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """Other programs that take turns with the configurations."""

    against: Annotated[
        list[str] | None,
        _peer(
            metavar="mlx-lm",
            help="mlx-lm in the same process, on the same weights: plain, with the draft at every "
            "K of --configs, and its batch generator with --rows.",
        ),
    ] = None
    server: Annotated[
        list[str] | None,
        _peer(
            metavar="URL|known",
            help="A server of OpenAI's protocol, such as http://localhost:1234; repeatable. "
            "`known` looks for mlxspec or vLLM, LM Studio, mlx_lm.server, Ollama and exo here.",
        ),
    ] = None
    server_model: Annotated[
        str | None,
        _peer(
            metavar="NAME",
            help="The model that servers are asked for; by default the one that is named like the "
            "target, or the first that they have.",
        ),
    ] = None
    server_key_env: Annotated[
        str | None,
        _peer(metavar="VAR", help="The variable of the environment that holds the servers' key."),
    ] = None

    def require_sense(self) -> None:
        """Raise UsageError where a program is not known, or options of servers lack a server."""
        for name in self.against or ():
            if name not in _PROGRAMS:
                near = nearest(name, _PROGRAMS)
                raise UsageError(
                    f"--against {name!r} is no program that runs in this process.",
                    hint=f"Did you mean {near}?" if near else "Name mlx-lm, or --server URL.",
                )
        for option, value in (
            ("--server-model", self.server_model),
            ("--server-key-env", self.server_key_env),
        ):
            if value is not None and not self.server:
                raise UsageError(f"{option} says nothing without --server.", hint="Add --server.")

    def arms(self, own: Mapping[str, OwnArm], target: str) -> list[PeerArm]:
        """An arm for each program.

        Args:
            own: the configurations by name. target: its name.

        Raises:
            UsageError: an address or a key is none.
        """
        from mlxspec.bench.cells import BASELINE
        from mlxspec.bench.mlx_lm_arm import mlx_lm_arms
        from mlxspec.bench.peers import server_arms

        found: list[PeerArm] = [*mlx_lm_arms(own)] if self.against else []
        tokenizer = own[BASELINE].engine.tokenizer
        assert tokenizer is not None
        return found + [
            *server_arms(
                self.server or (),
                tokenizer,
                target=target,
                model=self.server_model,
                key_env=self.server_key_env,
            )
        ]
