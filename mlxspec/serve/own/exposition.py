"""The server's counts as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mlxspec.serve.core.counts import Counts, Histogram, Routed
from mlxspec.serve.core.watch import Live, Watch


class Exposition(Collector):
    """Metrics that are made of a watch's counts whenever somebody asks.

    Speculation has the names that vLLM gave it, everything else the prefix `mlxspec_`.

    Args:
        watch: counts. model: its name, a label of the metrics of speculation.
    """

    def __init__(self, watch: Watch, model: str) -> None:
        self._watch = watch
        self._model = model
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are those that `collect` gives."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        counts, live = self._watch.counts, self._watch.live()
        yield from self._speculation(counts)
        yield from _texts(counts)
        yield from _routed(counts.routed)
        yield from _times(counts)
        yield from _now(live, self._watch.plain_s())

    def _speculation(self, counts: Counts) -> Iterator[Metric]:
        stats = counts.speculation
        drafts = sum(source.rounds for source in stats.by_source.values())
        labels = ("model_name",)
        for name, what, value in (
            ("drafts", "Rounds of single texts that had proposals.", drafts),
            ("draft_tokens", "Tokens that were proposed.", stats.drafted),
            ("accepted_tokens", "Proposed tokens that were kept.", stats.accepted),
        ):
            one = CounterMetricFamily(f"vllm:spec_decode_num_{name}", what, labels=labels)
            one.add_metric([self._model], value)
            yield one
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Proposed tokens that were kept, by their position in the proposal, from 0.",
            labels=(*labels, "position"),
        )
        for position, accepted in enumerate(stats.accepted_by_position):
            positions.add_metric([self._model, str(position)], accepted)
        yield positions


def _texts(counts: Counts) -> Iterator[Metric]:
    yield _counter("requests", "HTTP requests that are over.", ("route", "status"), counts.calls)
    yield _counter("texts", "Texts that were begun.", (), {(): counts.texts})
    ended = {(reason,): count for reason, count in counts.ended.items()}
    yield _counter("texts_ended", "Texts that have ended, by the reason.", ("reason",), ended)
    for name, what, value in (
        ("prompt_tokens", "Tokens of the prompts of texts that have ended.", counts.prompt_tokens),
        ("cached_prompt_tokens", "Those of them that were not read again.", counts.cached_tokens),
    ):
        yield _counter(name, what, (), {(): value})
    by_author = {(author,): count for author, count in counts.written_by.items()}
    yield _counter("written_tokens", "Tokens that were written.", ("author",), by_author)
    yield _counter(
        "rows",
        "Rounds of single texts, by the rows of the round and by what was proposed for the text.",
        ("bucket", "draft_tokens"),
        counts.rows,
    )
    sources = counts.speculation.by_source
    for name, of in (("drafted", "were proposed"), ("accepted", "were kept")):
        by_source = {(source,): getattr(one, name) for source, one in sources.items()}
        yield _counter(f"{name}_tokens", f"Proposals that {of}.", ("source",), by_source)


def _routed(routed: Routed) -> Iterator[Metric]:
    """Answers that another host might have given."""
    for name, what, value in (
        ("answers", "Answers for which an upstream might have been asked.", routed.answers),
        ("spilled", "Those for which it was.", routed.spilled),
        ("used", "Those whose text is the upstream's.", routed.used),
        ("failed", "Those that it was asked for and did not give.", routed.failed),
        ("spent_tokens", "Tokens that it read and wrote.", routed.spent_tokens),
        ("saved_tokens", "Tokens of answers that stayed local.", routed.saved_tokens),
        ("cost", "What its answers cost, in the currency of its prices.", routed.cost),
        ("saved", "What answers that stayed local would have cost.", routed.saved),
    ):
        yield _counter(f"routed_{name}", what, (), {(): value})
    rules = {(rule,): count for rule, count in routed.rules.items()}
    yield _counter("routed_rules", "Rules that asked for the upstream.", ("rule",), rules)


def _times(counts: Counts) -> Iterator[Metric]:
    yield _histogram(
        "time_to_first_token_seconds",
        "From a request to the first tokens of a text.",
        counts.first_token_s,
    )
    yield _histogram(
        "time_between_tokens_seconds",
        "Between rounds that brought tokens to a text.",
        counts.between_s,
    )
    yield _histogram("text_seconds", "From a request to the end of a text.", counts.whole_s)


def _now(live: Live, plain_s: float | None) -> Iterator[Metric]:
    yield _gauge("texts_running", "Texts that are written now.", live.running)
    yield _gauge("texts_waiting", "Texts that wait, or are being read, now.", live.waiting)
    if plain_s is not None:
        yield _gauge("plain_round_seconds", "A round of one text without proposals.", plain_s)
    if (cache := live.cache) is not None:
        yield _gauge("cache_bytes", "Bytes that the cache of prefixes holds.", cache.nbytes)
        yield _gauge("cache_max_bytes", "The most that it may hold.", cache.max_bytes)
        for name, what, value in (
            ("cache_texts", "Texts that could have begun from it.", cache.texts),
            ("cache_hits", "Those that did.", cache.hits),
            ("cache_tokens", "Tokens of their prompts.", cache.tokens),
            ("cache_hit_tokens", "Those of them that were not read again.", cache.hit_tokens),
        ):
            yield _counter(name, what, (), {(): value})


def _counter(name: str, what: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    metric = CounterMetricFamily(f"mlxspec_{name}", what, labels=labels)
    for of, value in sorted(values.items(), key=str):
        metric.add_metric([str(one) for one in of], value)
    return metric


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mlxspec_{name}", what, value=value)


def _histogram(name: str, what: str, histogram: Histogram) -> Metric:
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, histogram.up_to(), strict=True))
    return HistogramMetricFamily(
        f"mlxspec_{name}", what, buckets=buckets, sum_value=histogram.total_s
    )
