"""The run of `mlxspec bench`: groups take turns until each is known well enough, or time is up."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Protocol

from mlxspec.bench.arms import Arm, Asked, OwnArm, Place, Written
from mlxspec.bench.cells import BASELINE, Sample
from mlxspec.bench.group_run import GroupRun
from mlxspec.bench.plan import Group, Settings
from mlxspec.bench.prompt_sets import Prompt, Step, ledger, systems
from mlxspec.bench.results import Peer
from mlxspec.bench.summing import Series
from mlxspec.errors import MlxspecError, PromptError
from mlxspec.metrics import Progress, Tell

WARM_UP, REFERENCE = "warming up", "reference"
REFERENCE_TOKENS = 32  # of the text that shows the machine's own drift
REFERENCE_SHARE = 0.1  # of the time, at most


class PeerArm(Arm, Protocol):
    """Another program that takes turns with the configurations.

    beside: whether it can write texts side by side.
    """

    @property
    def beside(self) -> bool: ...

    def result(
        self, series: Series, errors: Sequence[str], ours: Mapping[str, Sequence[Sample]]
    ) -> Peer:
        """What came of it.

        Args:
            series: the turns in which it answered. errors: of the others.
            ours: the samples of every configuration in the same groups, by name.
        """


class Run(Iterator[Progress]):
    """Measures: an iterator of progress, with everything measured so far beside it.

    A loop that ends early, because a person interrupts it, leaves whole turns.

    Args:
        arms: by the names of the groups' configurations. groups: see `plan.planned`.
        peers: others, which take turns with the configurations.
        tell: called with what a person should know meanwhile.
    """

    def __init__(
        self,
        arms: Mapping[str, OwnArm],
        groups: Sequence[Group],
        prompts: Sequence[Prompt],
        settings: Settings,
        *,
        peers: Sequence[PeerArm] = (),
        tell: Tell,
    ) -> None:
        self.groups = [GroupRun(group, prompts) for group in groups]
        self.settings = settings
        self.asked_peers, self.peers = tuple(peers), list(peers)
        self.reference: list[tuple[float, float]] = []
        self.is_over = False
        self._arms = arms
        self._tell = tell
        self._answers: dict[tuple[Group, str], str] = {}
        self._began = time.perf_counter()
        self._warm: set[Group] = set()
        self._places = 0
        self._reference_s = 0.0
        self._progress = self._measured()

    def __next__(self) -> Progress:
        return next(self._progress)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._began

    @property
    def left_s(self) -> float:
        """Seconds until it is likely to be over."""
        budget = 60 * self.settings.minutes - self.seconds
        needed = 0.0
        known = [one.taken_s / one.turns for one in self.groups if one.turns]
        for one in self.groups:
            turn_s = one.taken_s / one.turns if one.turns else max(known, default=inf)
            turns = one.turns_left(self.settings.precision)
            needed += turn_s * turns if turns else 0.0
        return max(0.0, min(budget, needed))

    @property
    def turns(self) -> int:
        return sum(one.turns for one in self.groups)

    def _measured(self) -> Iterator[Progress]:
        self._began = time.perf_counter()
        gc.freeze()  # what was there before need not be looked at between texts
        try:
            self._refer(warm=True)
            while pending := [one for one in self.groups if not one.over]:
                for one in pending:
                    if self.seconds > 60 * self.settings.minutes:
                        self.is_over = True
                        return
                    yield from self._taken(one)
            self.is_over = True
        finally:
            gc.unfreeze()

    def _taken(self, one: GroupRun) -> Iterator[Progress]:
        """A turn of a group. A text that does not fit ends its group alone."""
        try:
            yield from self._warmed_up(one)
            yield from self._turn(one)
        except MlxspecError as error:
            one.give_up(error.message)
            self._tell(f"{one.group.in_words()}: {error.message}")
        self._refer()

    # --- warming up -----------------------------------------------------------------------

    def _warmed_up(self, one: GroupRun) -> Iterator[Progress]:
        """Write a text with every arm where these conditions are new, which traces its rounds."""
        kind = replace(one.group, prompt_type="", system="none")
        if kind in self._warm:
            return
        self._warm.add(kind)
        takers = self._takers(one)
        for done, arm in enumerate(takers):
            yield Progress(WARM_UP, done, len(takers), None, f"{arm.name}, {one.group.in_words()}")
            asked = self._next(one, 0)[1]
            if asked is None:
                return
            if isinstance(arm, OwnArm):
                self._write(one, arm, asked, 0)
                arm.let_go()
            else:
                self._try_peer(one, arm, asked)

    def _try_peer(self, one: GroupRun, peer: Arm, asked: Asked) -> None:
        """Let a peer write once, and leave it out where it cannot."""
        try:
            _writes(one, peer)(asked, Place(0, 0, 0.0))
        except MlxspecError as error:
            self.peers = [other for other in self.peers if other is not peer]
            one.errors[peer.name].append(error.message)
            self._tell(f"{peer.name} is left out: {error.message}")

    # --- turns ----------------------------------------------------------------------------

    def _turn(self, one: GroupRun) -> Iterator[Progress]:
        """One prompt with every arm of a group. It counts once all of them are over."""
        turn, started = one.turns, time.perf_counter()
        step, asked = self._next(one, turn)
        if step is None or asked is None:
            return
        written: dict[str, Written] = {}
        takers = self._takers(one)
        for arm in takers[::-1] if one.is_backwards(turn) else takers:
            yield self._progress_of(one, len(written), len(takers), arm.name)
            if isinstance(arm, OwnArm):
                written[arm.name] = self._write(one, arm, asked, turn)
                self._split(one, arm, turn)
            else:
                self._ask(one, arm, asked, turn)
        self._add(one, step, written)
        one.taken_s += time.perf_counter() - started
        one.turns += 1
        one.settle(self.settings.precision)
        yield self._progress_of(one, len(takers), len(takers), "")

    def _takers(self, one: GroupRun) -> list[Arm]:
        own: list[Arm] = [self._arms[arm.name] for arm in one.group.arms]
        beside = "rows" in one.group.questions
        return own + [peer for peer in self.peers if peer.beside or not beside]

    def _progress_of(self, one: GroupRun, done: int, total: int, detail: str) -> Progress:
        return Progress(one.group.in_words(), done, total, self.left_s, detail)

    def _next(self, one: GroupRun, turn: int) -> tuple[Step | None, Asked | None]:
        """The next step that fits the model's context, and what every arm is asked."""
        while one.steps:
            step = one.steps[turn % len(one.steps)]
            try:
                asked = self._asked(one.group, step, one.steps, turn)
                for request in self._arms[BASELINE].requests(asked):
                    if request.limit < len(request.tokens) + asked.max_tokens:
                        raise PromptError("It leaves no room for an answer.", hint="Shorten it.")
                return step, asked
            except PromptError as error:
                one.drop(step, error.message)
        return None, None

    def _asked(self, group: Group, step: Step, steps: Sequence[Step], turn: int) -> Asked:
        """What every arm is asked.

        Raises:
            PromptError: the step needs an answer that is empty.
        """
        at = steps.index(step)
        side_by_side = [steps[(at + row) % len(steps)] for row in range(group.rows)]
        messages = [self._messages(group, one, at) for one in side_by_side]
        return Asked(
            prompt=f"context-{group.context}-{at}" if group.context else step.id,
            messages=messages,
            max_tokens=self.settings.max_tokens,
            temperature=group.temperature,
            seed=self.settings.seed + turn,
        )

    def _messages(self, group: Group, step: Step, variant: int) -> list[dict[str, str]]:
        system = systems()[group.system]
        found = [{"role": "system", "content": system}] if system else []
        if group.context:
            text = ledger(group.context, variant, self._counter(found))
            return [*found, {"role": "user", "content": text}]
        for before in step.before:
            answer = self._answers.get((group, before.id), "")
            if not answer.strip():
                raise PromptError("The answer before it is empty.", hint="Leave it out.")
            found.append({"role": "user", "content": before.text})
            found.append({"role": "assistant", "content": answer})
        return [*found, {"role": "user", "content": step.text}]

    def _counter(self, before: Sequence[dict[str, str]]) -> Callable[[str], int]:
        """Counts the tokens of a prompt."""
        arm = self._arms[BASELINE]

        def count(text: str) -> int:
            messages = [[*before, {"role": "user", "content": text}]]
            asked = Asked(prompt="", messages=messages, max_tokens=1)
            return len(arm.requests(asked)[0].tokens)

        return count

    def _write(self, one: GroupRun, arm: OwnArm, asked: Asked, turn: int) -> Written:
        gc.collect()  # what the text before held would count as this one's memory
        place = Place(turn, self._places, self.seconds)
        self._places += 1
        return _writes(one, arm)(asked, place)

    def _split(self, one: GroupRun, arm: OwnArm, turn: int) -> None:
        """Time the parts of a round once behind each of the first two texts."""
        if turn < 2 and "rows" not in one.group.questions and not arm.configuration.is_baseline:
            found = arm.split()
            if found is not None:
                one.series[arm.name].splits.append(found)
        arm.let_go()

    def _ask(self, one: GroupRun, peer: Arm, asked: Asked, turn: int) -> None:
        """Let a peer write; what fails costs its sample, and not the run."""
        place = Place(turn, self._places, self.seconds)
        self._places += 1
        try:
            one.theirs[peer.name].add(_writes(one, peer)(asked, place))
        except MlxspecError as error:
            one.errors[peer.name].append(error.message)

    def _add(self, one: GroupRun, step: Step, written: Mapping[str, Written]) -> None:
        """Add a whole turn: each text is held against the one of plain decoding."""
        plain = written[BASELINE]
        self._answers[one.group, step.id] = plain.texts[0]
        for name, new in written.items():
            same = None
            if new is not plain and new.rule in ("greedy", "coupled"):
                same = list(new.tokens) == list(plain.tokens)
            one.series[name].add(new, same)

    def _refer(self, *, warm: bool = False) -> None:
        """Decode the same text plainly once more, where that takes little of the time.

        Args:
            warm: once before, which does not count: its length is new.
        """
        if not warm and self._reference_s > REFERENCE_SHARE * self.seconds:
            return
        one = next((one for one in self.groups if one.steps), None)
        if one is None:
            return
        step = one.steps[0]
        messages = [[{"role": "user", "content": step.prompt.turns[0]}]]
        asked = Asked(prompt=REFERENCE, messages=messages, max_tokens=REFERENCE_TOKENS)
        arm = self._arms[BASELINE]
        for _ in range(1 + warm):
            started = self.seconds
            sample = arm.write(asked, Place(0, 0, started)).sample
        arm.let_go()
        self._reference_s += self.seconds - started
        if sample.tokens_per_second:
            self.reference.append((started, sample.tokens_per_second))


def _writes(one: GroupRun, arm: Arm) -> Callable[[Asked, Place], Written]:
    """How an arm writes under a group's conditions."""
    return arm.write_beside if "rows" in one.group.questions else arm.write
