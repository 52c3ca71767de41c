"""`mlxspec serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxspec.cli import engines
from mlxspec.cli.arguments.grouping import grouped
from mlxspec.cli.arguments.options import ModelOptions, TemplateArgOption, template_args
from mlxspec.cli.arguments.sampling import SamplingOptions
from mlxspec.cli.cascade import RoutingOptions, UpstreamOptions
from mlxspec.cli.disk import require_here
from mlxspec.cli.interrupts import handed_to
from mlxspec.control import records
from mlxspec.defaults import INTERRUPTED
from mlxspec.errors import MlxspecError, UsageError
from mlxspec.files import expanded
from mlxspec.metrics import Tell
from mlxspec.pairs.table import Pair

if TYPE_CHECKING:
    from mlxspec.cascade.upstreams import Upstream
    from mlxspec.cli.screen.board import Board
    from mlxspec.decode.engine import Engine
    from mlxspec.serve.core.settings import Settings
    from mlxspec.serve.core.store import Store

_server = partial(typer.Option, rich_help_panel="Server")
_limits = partial(typer.Option, rich_help_panel="Limits")

EXAMPLES = """
Examples:
  mlxspec serve --pair qwen3-8b
  mlxspec serve --target ./model --draft ./small-model --port 0
  mlxspec serve --pair qwen3-8b --upstream cerebras --routing speculative_decoding
  MLXSPEC_KEY=... mlxspec serve --host 0.0.0.0 --api-key-env MLXSPEC_KEY
"""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens, to whom, and how much it takes."""

    host: Annotated[str, _server(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[
        int, _server(min=0, max=65535, help="The port to listen on; 0 takes any that is free.")
    ] = 8000
    api_key_env: Annotated[
        str | None,
        _server(metavar="VAR", help="The environment variable with the key that clients send."),
    ] = None
    no_key: Annotated[
        bool,
        _server("--no-key", help="Ask for no key, even where other machines reach the address."),
    ] = False
    drain_s: Annotated[
        float,
        _server(
            min=0,
            metavar="SECONDS",
            help="After Ctrl-C or SIGTERM, wait this long for texts that are being written.",
        ),
    ] = 30.0
    log_texts: Annotated[
        bool, _server("--log-texts", help="Log prompts and what was written to them too.")
    ] = False
    template_arg: TemplateArgOption = None
    max_rows: Annotated[
        int, _limits(min=1, max=32, help="The most texts that are written at a time.")
    ] = 8
    max_queue: Annotated[
        int, _limits(min=0, help="The most texts that wait beside them; others get a 429.")
    ] = 64
    max_tokens: Annotated[
        int | None,
        _limits(
            min=1,
            help="The most tokens of an answer, and what a request gets that asks for no number; "
            "by default the end of the context.",
        ),
    ] = None
    max_prompt_tokens: Annotated[
        int | None, _limits(min=1, help="The longest prompt in tokens; by default the context.")
    ] = None
    max_choices: Annotated[int, _limits(min=1, help="The most texts of one request.")] = 8
    max_body_mb: Annotated[int, _limits(min=1, help="The longest body of a request in MiB.")] = 8
    cache_gb: Annotated[
        float,
        _limits(
            min=0,
            help="Memory for what was read of prompts, in GB: a prompt that begins like an earlier "
            "one is read from where they part. 0 keeps nothing.",
        ),
    ] = 1.0
    cache_dir: Annotated[
        Path | None,
        _limits(
            metavar="DIR",
            help="Keep what was read of prompts in this folder too, for the next server of the "
            "same models.",
        ),
    ] = None

    def key(self) -> str | None:
        """The key that clients must send.

        Raises:
            UsageError: there is none where one is needed, or the variable is empty.
        """
        from mlxspec.pairs.servers import is_loopback

        if self.api_key_env is not None:
            if key := os.environ.get(self.api_key_env, "").strip():
                return key
            raise UsageError(
                f"The environment has no key in {self.api_key_env}.",
                hint=f"Set it, such as with: export {self.api_key_env}=$(openssl rand -hex 16)",
            )
        if not is_loopback(self.host) and not self.no_key:
            raise UsageError(
                f"Others reach {self.host}, and the server would ask nobody for a key.",
                hint="Name a variable that holds one with --api-key-env; --no-key does without.",
            )
        return None

    def store(self, tell: Tell) -> Store | None:
        """Where pasts outlast the server, if they are to."""
        from mlxspec.control import places
        from mlxspec.serve.core.store import Store

        if self.cache_dir is None:
            return None
        if self.cache_gb == 0:
            raise UsageError(
                "--cache-dir keeps nothing with --cache-gb 0.", hint="Leave one of them out."
            )
        folder = expanded(self.cache_dir)
        places.note(places.Place(folder, int(self.cache_gb * 1e9)), tell)
        return Store(folder, tell)

    def settings(self, pair: Pair, usual: Mapping[str, Any]) -> Settings:
        """The settings of a server with these options."""
        from mlxspec.serve.core.settings import Settings

        about = {"pair": pair.name, "target": pair.target_name, "draft": pair.draft_name}
        return Settings(
            name=pair.name,
            about=about,
            usual=usual,
            key=self.key(),
            max_rows=self.max_rows,
            max_queue=self.max_queue,
            max_tokens=self.max_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            max_choices=self.max_choices,
            max_body_bytes=self.max_body_mb * 2**20,
            log_texts=self.log_texts,
        )


@grouped
def serve(
    *,
    models: ModelOptions,
    sampling: SamplingOptions,
    server: ServerOptions,
    upstream: UpstreamOptions,
    routing: RoutingOptions,
) -> None:
    """Serve a pair over HTTP, for clients of OpenAI's and Anthropic's APIs."""
    _require_libraries()
    from mlxspec.cli.screen.board import open_board
    from mlxspec.pairs.stock import recommended_of
    from mlxspec.serve.core.service import Service
    from mlxspec.serve.core.worker import Worker
    from mlxspec.serve.running import Server, listen

    pair = models.chosen()
    require_here(pair, speculation=models.speculates)
    usual = {
        "draft_tokens": models.draft_tokens,
        "sampling": sampling.params({**recommended_of(pair), **pair.sampling}),
        "system": pair.system,
        "template_args": {**pair.template_args, **template_args(server.template_arg)},
    }
    upstream.require_place()
    settings = replace(
        server.settings(pair, usual),
        upstream=upstream.policy(),
        routing=routing.strategy(upstream),
    )
    listening = listen(server.host, server.port)
    with open_board(settings, listening, server.api_key_env) as board:
        preparing = _Preparing(pair, models, settings, board, int(server.cache_gb * 1e9))
        store = server.store(board.log)

        def settled() -> None:
            board.ready(worker) if worker.failure is None else process.tell_to_end()

        worker = Worker(preparing, settings.max_rows, board.log, settled=settled, store=store)
        service = Service(settings, worker, board.called)
        process = Server(service, listening, server.drain_s)
        board.follow(service)
        if settings.upstream is not None:
            board.log(_upstream_in_words(settings.upstream.client.upstream, settings.routing))
        with handed_to(process.tell_to_end):
            worker.start()
            process.serve_until_told()
        board.end()
        if not worker.settled:
            raise typer.Exit(INTERRUPTED)  # nobody waits until it is loaded
        worker.stop()
        if worker.failure is not None:
            raise worker.failure
        preparing.remember()


def _upstream_in_words(upstream: Upstream, strategy: str) -> str:
    """Which prompts leave this machine, and where they go."""
    whose = {"local": "requests that ask for it", "upstream": "all requests"}
    of = whose.get(strategy, "requests whose answer a rule doubts")
    return f"prompts of {of} go to the upstream {upstream.name}, {upstream.base_url}"


class _Preparing:
    """Loads an engine on the worker's thread, and keeps what it learns for the next server."""

    def __init__(
        self, pair: Pair, models: ModelOptions, settings: Settings, board: Board, cache_bytes: int
    ) -> None:
        self._pair = pair
        self._models = models
        self._settings = settings
        self._board = board
        self._cache_bytes = cache_bytes
        self._record: records.Record | None = None
        self._engine: Engine | None = None

    def __call__(self) -> Engine:
        from mlxspec.decode.prefixes import PrefixCache

        usual = self._settings.usual
        with self._board.loading() as display:
            engine = engines.load_engine(self._pair, self._models, display, [], quiet=False)
            options = {"draft_tokens": usual["draft_tokens"], "sampling": usual["sampling"]}
            request = engine.request([0], **options)
            if request.auto:
                self._record = engines.recall(self._pair, engine, display)
            engines.build_kernels(engine, request, display, beside=self._settings.max_rows > 1)
        engine.prefixes = PrefixCache(self._cache_bytes)
        self._engine = engine
        return engine

    def remember(self) -> None:
        """Keep what was learned; does nothing where nothing was."""
        if self._record is not None and self._engine is not None:
            record = replace(self._record, learned=self._engine.learned)
            records.remember(record, self._board.log)


def _require_libraries() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn

        del fastapi, prometheus_client, uvicorn
    except ImportError as error:
        raise MlxspecError(
            f"`mlxspec serve` needs the package {error.name}, which is not installed.",
            hint="Install what a server needs: pip install 'mlxspec[serve]'",
        ) from error
