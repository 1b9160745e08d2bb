"""What /metrics tells, in Prometheus' text format. Names are vLLM's where they mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pyengine.serve.store import ResponseStore, Store

if TYPE_CHECKING:
    from pyengine.results import FinishReason, Timings
    from pyengine.serve.models import Models

CONTENT_TYPE = b"text/plain; version=1.0.0; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = tuple(float(1 << i) for i in range(18))
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """Counters and histograms of one server, and a look at its engines when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels, registry = ["model_name"], self.registry
        self.requests = Counter(
            "pyengine:http_requests", "Answers, by path and status", ["path", "status"], registry=self.registry
        )
        self.aborted = Counter("pyengine:request_aborted", "Requests whose client went away", registry=self.registry)
        self.success = Counter(
            "vllm:request_success",
            "Outputs, by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "vllm:prompt_tokens", "Prompt tokens, and those of texts to embed", labels, registry=registry
        )
        self.generation_tokens = Counter("vllm:generation_tokens", "Output tokens", labels, registry=registry)
        self.cache_queries = Counter("vllm:prefix_cache_queries", "Prompt tokens looked up", labels, registry=registry)
        self.cache_hits = Counter("vllm:prefix_cache_hits", "Prompt tokens found", labels, registry=registry)
        self.drafted = Counter(
            "vllm:spec_decode_num_draft_tokens", "Tokens guessed ahead and computed", labels, registry=registry
        )
        self.accepted = Counter(
            "vllm:spec_decode_num_accepted_tokens", "Of these, those that came true", labels, registry=registry
        )
        self.prompt_lengths = Histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of an output", labels, buckets=_TOKENS, registry=registry
        )
        self.output_lengths = Histogram(
            "vllm:request_generation_tokens", "Tokens of an output", labels, buckets=_TOKENS, registry=registry
        )
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the request to its first token",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between tokens, the mean of one output",
            labels,
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From the request to its last token",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(
        self, models: Callable[[], Models], counts: Callable[[], Mapping[str, tuple[int, int]]], store: Store
    ) -> None:
        """Also tell of these models' engines, of each one's (waiting, running) requests, and of what is kept in this process."""
        self.registry.register(_Engines(models, counts))
        if not isinstance(store, ResponseStore):
            return
        stored = Gauge("pyengine:stored_responses", "Responses that are kept", registry=self.registry)
        stored.set_function(lambda: len(store))
        stored_bytes = Gauge("pyengine:stored_responses_bytes", "Bytes that they count as", registry=self.registry)
        stored_bytes.set_function(lambda: store.n_bytes)

    def note_prompt(self, model: str, n_tokens: int, n_cached: int) -> None:
        """A prompt was computed, or texts to embed: n_tokens, of which n_cached were found in the cache."""
        self.prompt_tokens.labels(model).inc(n_tokens)
        self.cache_queries.labels(model).inc(n_tokens)
        self.cache_hits.labels(model).inc(n_cached)

    def note(self, model: str, finish_reason: FinishReason, timings: Timings) -> None:
        """One output has ended."""
        self.note_prompt(model, timings.prompt_tokens, timings.cached_tokens)
        self.success.labels(model, finish_reason).inc()
        self.generation_tokens.labels(model).inc(timings.generated_tokens)
        self.prompt_lengths.labels(model).observe(timings.prompt_tokens)
        self.output_lengths.labels(model).observe(timings.generated_tokens)
        self.drafted.labels(model).inc(timings.drafted_tokens)
        self.accepted.labels(model).inc(timings.accepted_tokens)
        self.first_token.labels(model).observe(timings.time_to_first_token)
        self.latency.labels(model).observe(timings.total)
        if timings.generated_tokens > 1:
            mean = (timings.total - timings.time_to_first_token) / (timings.generated_tokens - 1)
            self.between_tokens.labels(model).observe(mean)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def snapshot(self) -> list[Family]:
        """All that `text` tells, as values of JSON's types."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                [(one.name, one.labels, one.value) for one in family.samples],
            )
            for family in self.registry.collect()
        ]


# name, documentation, type, [(name, labels, value) of a sample]
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


def text_of(snapshots: Mapping[int, Iterable[Family]]) -> bytes:
    """The metrics of several processes, {number: its snapshot}, told apart by the label `process`."""
    return generate_latest(_Processes(snapshots))


class _Processes:
    def __init__(self, snapshots: Mapping[int, Iterable[Family]]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("pyengine:processes", "Processes that these metrics are of", value=len(self._snapshots))
        families: dict[str, Metric] = {}
        for number, snapshot in sorted(self._snapshots.items()):
            for name, documentation, kind, samples in snapshot:
                family = families.setdefault(name, Metric(name, documentation, kind))
                for sample, labels, value in samples:
                    family.add_sample(sample, {**labels, "process": str(number)}, value)
        yield from families.values()


class _Engines:
    """A collector: what is read when it is asked for. Waits for the step that runs, so not in an event loop."""

    def __init__(self, models: Callable[[], Models], counts: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        self._models = models
        self._counts = counts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        from pyengine import _core

        labels, models, counts = ["model_name"], self._models(), self._counts()
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that have not started", labels=labels)
        running = GaugeMetricFamily("vllm:num_requests_running", "Requests that are computed", labels=labels)
        for name in models.names():
            for family, count in zip((waiting, running), counts.get(name, (0, 0)), strict=True):
                family.add_metric([name], count)
        yield from (waiting, running)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the allowed memory in use", labels=labels)
        held = GaugeMetricFamily("pyengine:kv_bytes", "Bytes of keys and values, cached ones included", labels=labels)
        evicted = CounterMetricFamily("pyengine:kv_pages_evicted", "Cached pages that made room", labels=labels)
        for model in models:
            stats = model.engine.cache_stats()
            allowed = stats["max_pages"] * stats["page_bytes"]
            usage.add_metric([model.name], stats["n_held_bytes"] / allowed if allowed else 0.0)
            held.add_metric([model.name], stats["n_bytes"])
            evicted.add_metric([model.name], stats["n_evicted"])
        yield from (usage, held, evicted)
        throttling = _core.throttling()
        yield CounterMetricFamily(
            "pyengine:cpu_periods", "Periods of the cgroup's CPU quota", value=throttling["n_periods"]
        )
        yield CounterMetricFamily(
            "pyengine:cpu_throttled_periods", "Periods in which the quota stopped us", value=throttling["n_throttled"]
        )
