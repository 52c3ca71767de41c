"""A conversation with a pair: the models, the settings, and one answer after another."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mlxspec.chat import documents
from mlxspec.chat.conversation import Conversation, Turn
from mlxspec.chat.sending import Filled, Sending
from mlxspec.cli import engines
from mlxspec.cli.arguments.options import ModelOptions
from mlxspec.cli.arguments.sampling import SamplingOptions
from mlxspec.cli.chat.keyboard import unechoed
from mlxspec.cli.screen.output import Output, explain
from mlxspec.cli.screen.summary import in_short
from mlxspec.cli.screen.terminal import columns_of, fitted
from mlxspec.control import records
from mlxspec.defaults import DraftTokens
from mlxspec.errors import MlxspecError
from mlxspec.metrics import Generation, counted
from mlxspec.pairs.table import Pair
from mlxspec.params import SamplingParams, changed

if TYPE_CHECKING:
    from mlxspec.cli.screen.display import Display
    from mlxspec.decode.engine import Engine
    from mlxspec.decode.run import Run

TEXT_TOKENS = 160  # of a model that knows of no turns, and so of no end of its own


class Interrupts:
    """What Ctrl-C does: it ends an answer at its next round, and anything else at once."""

    def __init__(self) -> None:
        self.came = False
        self._waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        if not self._waits:
            raise KeyboardInterrupt
        self.came = True

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, an interrupt is noted and raises nothing."""
        self.came, self._waits = False, True
        try:
            yield
        finally:
            self._waits = False


@dataclass
class Settings:
    """What a person may change between two answers.

    sampling: values by their names, over those of the command line and the pair.
    """

    max_tokens: int | None
    draft_tokens: DraftTokens | None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Totals:
    """The sums over all answers of a chat."""

    answers: int = 0
    tokens: int = 0
    decode_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0

    def add(self, generation: Generation) -> None:
        self.answers += 1
        self.tokens += len(generation.tokens)
        self.decode_s += generation.timing.decode_s
        self.drafted += generation.speculation.drafted
        self.accepted += generation.speculation.accepted
        self.prompt_tokens += generation.prompt_tokens
        self.cached_prompt_tokens += generation.cached_prompt_tokens


class Models:
    """A pair that is loaded, and what it learned.

    Args:
        options: of the command line. cache_bytes: memory for the pasts of prompts.
    """

    def __init__(self, options: ModelOptions, out: Output, cache_bytes: int) -> None:
        self._options = options
        self._out = out
        self._cache_bytes = cache_bytes
        self._record: records.Record | None = None
        self.pair: Pair = options.chosen()
        self.engine: Engine

    @property
    def name(self) -> str:
        """The pair's name, or that of a folder."""
        name = self.pair.name
        return Path(name).name or name if Path(name).is_dir() else name

    def load(self) -> None:
        from mlxspec.decode.prefixes import PrefixCache

        with unechoed(), self._out.display(text=False) as display:
            engine = engines.load_engine(
                self.pair, self._options, display, [], quiet=self._out.quiet
            )
            self._record = engines.recall(self.pair, engine, display)
        engine.prefixes = PrefixCache(self._cache_bytes)
        self.engine = engine

    def change(self, name: str) -> None:
        """Load another pair in place of this one, which stays where that fails.

        Raises:
            MlxspecError: it cannot be loaded.
        """
        before = self._options, self.pair
        others = replace(
            self._options, pair=name, target=None, draft=None, adapter=None, revision=None
        )
        pair = others.chosen()
        self.remember()
        self._options, self.pair = others, pair
        del self.engine  # two of them may not fit
        try:
            self.load()
        except (MlxspecError, KeyboardInterrupt):
            self._options, self.pair = before
            self.load()
            raise

    def remember(self) -> None:
        """Keep what was learned for the next run."""
        if self._record is not None and self.engine.learned.by_length:
            record = replace(self._record, learned=self.engine.learned)
            records.remember(record, self._out.aside)


class Talk:
    """One conversation, and the answers to it.

    Args:
        models: loaded. sampling: the options of the command line. template_args: of the chat
            template. out: where answers go. interrupts: of the whole chat.
    """

    def __init__(
        self,
        models: Models,
        conversation: Conversation,
        settings: Settings,
        sampling: SamplingOptions,
        template_args: Mapping[str, Any],
        out: Output,
        interrupts: Interrupts,
    ) -> None:
        self.models = models
        self.conversation = conversation
        self.settings = settings
        self.totals = Totals()
        self.out = out
        self.run: Run | None = None  # of the last answer
        self.file: Path | None = None  # that it was saved to, or loaded from
        self._sampling = sampling
        self._template_args = template_args
        self._interrupts = interrupts
        self._is_told = False  # that the context fills up
        self.failed = False  # whether any question had an error in place of an answer

    @property
    def sending(self) -> Sending:
        return Sending(self.models.engine, self._template_args)

    @property
    def sampling(self) -> SamplingParams:
        return self.sampling_with({})

    def sampling_with(self, values: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters, with some of them changed.

        Raises:
            UsageError: a value is out of its range, or values do not go together.
        """
        all_of_them = self.settings.sampling | dict(values)
        words = {name: all_of_them.pop(name, None) for name in ("seed", "verify")}
        return changed(self._sampling.params(self.models.pair.sampling), all_of_them, **words)

    @property
    def filled(self) -> Filled | None:
        """How full the context was at the end of the last answer."""
        if self.run is None:
            return None
        generation = self.run.generation
        return self.sending.filled(generation.prompt_tokens + len(generation.tokens))

    def load(self, path: Path) -> str:
        """Go on with a conversation that was saved; its last question if it has no answer."""
        self.conversation, question = documents.load(path)
        self.run, self.file = None, path
        self.out.aside(f"loaded {counted(len(self.conversation.turns), 'turn')} from {path}")
        return question

    def change_pair(self, name: str) -> None:
        """Go on with other models, which read the conversation anew."""
        self.run = None
        self.models.change(name)
        self.introduce()

    def introduce(self) -> None:
        """Say what a person has to know of the model before they write to it."""
        if not self.sending.has_turns:
            self.out.aside(
                f"{self.models.name} has no chat template, so it knows no questions: it goes on "
                "with your text. Try: def fibonacci(n):"
            )

    def answer(self, question: str) -> bool:
        """Answer a question; whether there is an answer, which is then a turn.

        Errors and interrupts are told, and leave the conversation as it was.
        """
        self.run = None  # its memory is needed
        try:
            run = self._answered(question)
        except MlxspecError as error:
            self.complain(error)
            return False
        except KeyboardInterrupt:
            self.out.aside("interrupted before the answer began")
            return False
        generation = run.generation
        if not generation.text.strip():
            self.out.aside("there is no answer, and the question is taken back")
            return False
        self.conversation.add(Turn(question, generation.text, generation.reasoning))
        self.totals.add(generation)
        self.run = run
        self._tell_if_full()
        return True

    def _answered(self, question: str) -> Run:
        engine, settings, sending = self.models.engine, self.settings, self.sending
        limit = settings.max_tokens
        if limit is None and not sending.has_turns:
            limit = TEXT_TOKENS
        sending.fit(self.conversation, question, limit, self.out.aside)
        request = engine.request(
            **sending.options(self.conversation, question),
            max_tokens=limit,
            draft_tokens=settings.draft_tokens,
            sampling=self.sampling,
        )
        run = engine.run(request)
        with unechoed(), self.out.display(folds=sending.has_turns) as display:
            engines.build_kernels(engine, request, display)
            self._show(run, display)
        if self.out.as_json:
            self.out.object({"question": question, **run.generation.as_dict()})
        return run

    def _show(self, run: Run, display: Display) -> None:
        """Show an answer to its end, or to where a person ends it."""
        generation = run.generation
        with closing(run) as events, self._interrupts.waiting(), display.running():
            for event in events:
                display.show(event, generation, generation.timing.decode_s)
                if self._interrupts.came:
                    break
        display.close()
        if not self.out.as_json and not sys.stdout.isatty() and not generation.text.endswith("\n"):
            self.out.line("")
        self.out.aside(" · ".join(in_short(generation)))

    def _tell_if_full(self) -> None:
        filled = self.filled
        if filled is None or not filled.is_nearly_full:
            self._is_told = False
        elif not self._is_told:
            self._is_told = True
            self.out.aside(
                f"the context is {filled.share:.0%} full, {filled.tokens:,} of "
                f"{filled.context:,} tokens: once it is full, the oldest turns are left out"
            )

    def status(self) -> str:
        """What holds for the next answer, in as many words as the terminal is wide."""
        drafts = self.settings.draft_tokens
        parts = [self.models.name]
        if (filled := self.filled) is not None:
            parts.append(f"context {filled.share:.0%}")
        parts += [f"temp {self.sampling.temperature:g}"]
        parts += [] if drafts is None else [f"draft {drafts or 'off'}"]
        return fitted(parts, columns_of(sys.stderr) - 1)

    def complain(self, error: MlxspecError) -> None:
        """Say what went wrong, and note that something did."""
        self.failed = True
        explain(error)

    @property
    def interrupted(self) -> bool:
        return self._interrupts.came
