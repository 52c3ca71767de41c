"""The speed-up to expect of a pair on this machine, measured before the pair is used, and tried.

One pass of a draft over a greedy text shows what rounds of every K would have kept, and so do the
proposals of heads and of text drafters along it (`replay`). Each K is counted by itself, because
longer rounds begin more often where the text is hard to guess.

All measurements of a kind take turns, and a median is quoted. How much is measured depends on how
long a pass takes (`plan`), and nothing more is measured where the first passes show that no draft
could pay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from mlxspec.control.replay import Proposed
from mlxspec.decode.alone import alone
from mlxspec.decode.engine import Engine
from mlxspec.decode.request import Prompt
from mlxspec.defaults import BUDGET_S, MAX_AUTO_TOKENS, DraftTokens
from mlxspec.errors import NothingDrafts
from mlxspec.measure import acceptance, plan
from mlxspec.measure.acceptance import Text
from mlxspec.measure.findings import Findings
from mlxspec.measure.forecast import Contender, MeasuredDrafter, pass_seconds
from mlxspec.measure.passes import Passes
from mlxspec.measure.plan import ALL, DRAFTED, Chosen, Plan, Trial
from mlxspec.measure.schedule import Schedule
from mlxspec.measure.timing import Key, Value, begun, halves, round_seconds, turns
from mlxspec.metrics import Progress

ROUNDS_OF_TEXT = 3  # that the longest K may fill a text with: of fewer, nothing can be told
CANDIDATES = 4  # values of K that a tuning tries

PROMPTS = (
    "def merge(left, right):\n",
    "class Cache:\n    def __init__(self, size):\n",
    "The bicycle was invented in the nineteenth century, and",
    '{"name": "Ada", "roles": ["admin", "author"], "active": true}\n{"name": "',
)


class Probe(Iterator[Progress]):
    """Measures a pair: an iterator of progress, with the findings so far beside it.

    A loop that ends early, because a person interrupts it, leaves all that was measured until then
    in `findings`.

    Args:
        prompts: texts, or token ids that are taken as they are.
        budget_s: seconds that measuring may take.
        candidates: the most values of K that are tried.

    Raises:
        NothingDrafts: nothing does. PromptError: a prompt is empty or too long.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        *,
        budget_s: float = BUDGET_S,
        candidates: int = 1,
    ) -> None:
        if not (engine.drafts or engine.heads or engine.texts):
            raise NothingDrafts
        self.findings = Findings(budget_s)
        self._engine = engine
        self._prompts = [engine.encode(prompt) for prompt in prompts]
        self._candidates = candidates
        self._steps = self._measured()

    def __next__(self) -> Progress:
        return next(self._steps)

    def _measured(self) -> Iterator[Progress]:
        yield from self._parts()
        self.findings.is_over = True

    def _parts(self) -> Iterator[Progress]:
        self._schedule = Schedule(self.findings.budget_s)
        self._passes = Passes(self._engine, self._schedule)
        yield from self._passes.look()
        self.findings.forecast = self._passes.forecast()
        if self.findings.is_settled:
            return
        taken = self._planned()
        if taken is None:
            return
        yield from self._pass_times(taken.plan)
        texts = yield from self._texts(taken)
        compiled = self._engine.compiles
        self._engines = {
            name: alone(self._engine, name, compiled=compiled)
            for name in (*self._engine.drafts, *self._engine.heads)
        }
        yield from self._drafters(taken.plan, texts)
        trial = self._chosen_trial(taken, texts)
        if trial is not None:
            yield from self._tried(trial, [prompt for prompt, _ in texts])

    def _planned(self) -> Chosen | None:
        """What is measured of all; None where not even the least fits."""
        findings, pace, left_s = self.findings, self._passes.pace, self._schedule.left_s
        sizes = [len(prompt) for prompt in self._prompts]
        whole_s = sum(pace.expected(ALL, sizes).values())
        findings.whole_s = findings.budget_s - left_s + whole_s
        taken = plan.chosen(pace, sizes, left_s)
        if taken is None:
            least_s = plan.enough(findings.budget_s - left_s + plan.least_s(pace, sizes))
            findings.ended = (
                f"nothing is settled: a pass over one row takes {pace.rows_s(1):.2g} s here; "
                f"--budget {least_s} leaves the time to count acceptance"
            )
            return None
        findings.left_out = plan.left_out(taken, None, None, len(sizes))
        rest_s = left_s - sum(taken.parts.values())
        self._schedule.expect(taken.parts | {plan.TRIAL: min(whole_s, max(rest_s, 0.0))})
        return taken

    def _turns(
        self,
        part: str,
        steps: Mapping[Key, Callable[[], Value]],
        found: dict[Key, list[Value]],
        repeats: int,
        *,
        warm_up: bool = True,
    ) -> Iterator[Progress]:
        """Let steps take turns as one part of the schedule."""
        yield self._schedule.begin(part, len(steps) * (repeats + warm_up))
        for done in turns(steps, found, repeats, warm_up=warm_up, enough=self._schedule.late):
            yield self._schedule.after(done)

    # --- the parts of a forecast ------------------------------------------------------------

    def _pass_times(self, taken: Plan) -> Iterator[Progress]:
        """Time the passes over all rows of the plan."""
        passes, steps = self._passes, self._passes.steps(taken.rows)
        yield from self._turns(
            plan.PASSES, steps, passes.times, taken.repeats, warm_up=taken.warm_up
        )
        self.findings.forecast = passes.forecast()

    def _texts(self, taken: Chosen) -> Generator[Progress, None, list[Text]]:
        """Texts that plain decoding writes."""
        texts: list[Text] = []
        tokens = taken.plan.tokens
        yield self._schedule.begin(plan.TEXTS, len(taken.prompts) * tokens)
        for at in taken.prompts:
            prompt, following = self._prompts[at][-taken.plan.prompt :], list[int]()
            for count in acceptance.written(self._engine, prompt, tokens, following):
                yield self._schedule.after(len(texts) * tokens + count)
            texts.append((prompt, following))
            if self._schedule.late():
                break
        return texts

    def _drafters(self, taken: Plan, texts: Sequence[Text]) -> Iterator[Progress]:
        """Time rounds of a running text and the steps of each draft, and count acceptance."""
        start, most = self._passes.start, min(max(taken.rows) - 1, taken.tokens // ROUNDS_OF_TEXT)
        running: dict[str, list[float]] = {}
        counts = {"": (self._engine, 0)}
        counts |= {name: (one, _drafted(one)) for name, one in self._engines.items()}
        steps = {
            name: partial(round_seconds, one, start, count, rounds=taken.rounds)
            for name, (one, count) in counts.items()
        }
        yield from self._turns(plan.RUNNING, steps, running, taken.turns, warm_up=taken.warm_up)
        found = replace(self._passes.forecast(), plain_s=median(running[""]))
        self.findings.forecast = found
        drafters = {}
        yield self._schedule.begin(plan.STEPS, len(self._engines))
        for done, (name, engine) in enumerate(self._engines.items(), 1):
            timed = _drafting(engine, start, taken.repeats)
            if timed is not None:
                count = _drafted(engine)
                others_s = timed.drafting_s(count) + pass_seconds(found.pass_s, count + 1)
                rounds = _counted(engine, texts, min(most, MAX_AUTO_TOKENS))
                host_s = median(running[name]) - others_s
                drafters[name] = replace(timed, host_s=host_s, rounds=rounds)
            yield self._schedule.after(done)
        for make in self._engine.texts:
            rounds = acceptance.of_text(make, texts, most)
            drafters[make().name] = MeasuredDrafter(0.0, 0.0, 0.0, rounds)
        told = {name: one for name, one in drafters.items() if one.rounds}
        self.findings.forecast = replace(found, drafters=told)
        self.findings.is_whole = True

    # --- the trial --------------------------------------------------------------------------

    def _chosen_trial(self, taken: Chosen, texts: Sequence[Text]) -> Trial | None:
        """The trial that fits into what is left of the budget; None where none does."""
        found = self.findings.forecast
        assert found is not None
        expected = {
            Contender(one.drafter, one.draft_tokens): one.speed_up for one in found.options()
        }
        per_token, tokens = plan.per_token(expected, found.plain_s), taken.plan.tokens
        reading_s = [self._passes.pace.reading_s(len(prompt)) for prompt, _ in texts]
        whole, *less = plan.trials(found.contenders(self._candidates), len(texts), tokens)
        self.findings.whole_s += whole.seconds(reading_s, per_token)
        left_s, building_s = self._schedule.left_s, self._passes.pace.building_s
        fits = (one for one in [whole, *less] if one.seconds(reading_s, per_token) <= left_s)
        # Without a turn that warms up, what is built must not count for much.
        trial = next((one for one in fits if one.bears(building_s, found.plain_s)), None)
        if trial is not None:
            self._schedule.expect({plan.TRIAL: trial.seconds(reading_s, per_token)})
        self.findings.left_out = plan.left_out(taken, trial, whole, len(self._prompts))
        return trial

    def _tried(self, trial: Trial, prompts: Sequence[Sequence[int]]) -> Iterator[Progress]:
        """Decode with each contender in turn; what is forecast is known to `auto`."""
        found = self.findings.forecast
        assert found is not None
        self._engine.learned.learn(0, found.knowledge())
        engines = self._engines | {"": self._engine}
        steps = {
            (one, at): partial(
                spent, engines[one.drafter], prompts[at], one.draft_tokens, trial.tokens
            )
            for at in range(trial.texts)
            for one in trial.contenders
        }
        times: dict[tuple[Contender, int], list[tuple[int, float]]] = {}
        for progress in self._turns(plan.TRIAL, steps, times, trial.repeats, warm_up=trial.warm_up):
            self.findings.tried = _speeds(times)
            yield progress
        self.findings.tried = _speeds(times)


def probe(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    budget_s: float = BUDGET_S,
    candidates: int = 1,
) -> Findings:
    """Measure a pair to the end, with the arguments of `Probe`."""
    measuring = Probe(engine, prompts, budget_s=budget_s, candidates=candidates)
    for _ in measuring:
        pass
    return measuring.findings


def spent(
    engine: Engine, prompt: Sequence[int], draft_tokens: DraftTokens, tokens: int
) -> tuple[int, float]:
    """Decode greedily and to token ids only. The engine learns for the next text.

    Returns:
        The number of tokens after the first rounds, in which the prompt is read, and their seconds.
    """
    session = begun(engine, prompt, draft_tokens=draft_tokens, max_tokens=tokens)
    first, started = len(session.text), time.perf_counter()
    while session.step().tokens:
        pass
    took = time.perf_counter() - started
    engine.learn_from(session)
    return len(session.text) - first, took


def _speeds(
    times: Mapping[tuple[Contender, int], Sequence[tuple[int, float]]],
) -> dict[Contender, float]:
    """Tokens per second of each contender over all texts, the median of the turns."""
    of_turns: dict[Contender, list[tuple[tuple[int, float], ...]]] = {}
    for one in dict.fromkeys(contender for contender, _ in times):
        texts = [some for (contender, _), some in times.items() if contender == one]
        of_turns[one] = list(zip(*texts, strict=True))
    return {
        one: median(sum(n for n, _ in turn) / sum(s for _, s in turn) for turn in some)
        for one, some in of_turns.items()
    }


def _drafted(engine: Engine) -> int:
    """K of the rounds that are timed of an engine's one drafter."""
    return min([DRAFTED, *(head.most for head in engine.heads.values())])


def _drafting(engine: Engine, start: Sequence[int], repeats: int) -> MeasuredDrafter | None:
    """Time the drafting alone of an engine's one drafter; None where it was left out."""
    count = _drafted(engine)
    session = begun(engine, start, draft_tokens=count)
    if engine.drafts and not session.drafted:
        return None
    (name,) = (*engine.drafts, *engine.heads)
    at_once = session.rounds.drafters[name].at_once
    all_s, _ = halves(session, count, repeats, name)
    if at_once or count == 1:
        return MeasuredDrafter(all_s, 0.0, 0.0, {}, at_once)
    first_s, _ = halves(session, 1, repeats, name)
    step_s = max(all_s - first_s, 0.0) / (count - 1)
    return MeasuredDrafter(first_s, step_s, 0.0, {})


def _counted(engine: Engine, texts: Sequence[Text], most: int) -> dict[int, list[Proposed]]:
    """What rounds of an engine's one drafter would keep along texts, by K."""
    if engine.heads:
        return acceptance.of_head(engine, texts, most)
    return acceptance.of_model(engine.models[1], texts, most)
