"""What /metrics says: vLLM's names where it has them, so that existing dashboards read them, and `pearl_*` beside.

Every figure is derived from the records of passes and texts as they are heard. What is drafted and accepted is counted
as in an evaluation (docs/reference/figures.md): a guess that arrived while a pass ran was not read by it. A rate of
`pearl_busy_seconds` or `pearl_waiting_seconds` is a share: seconds of work, or of waiting for the other side, in each
second. The drafter tells its own at the end of a text, so its rates are shares only over times that are long beside
texts.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from pearl.core.records import Pass
from pearl.engine import Generation
from pearl.engine.handle import Said
from pearl.server import TARGET
from pearl.server.texts import Text
from pearl.wire.reconnecting_channel import DrafterEvent

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATE = "the drafter's are added when a text ends"
FINISH = {"eos": "stop"}  # what OpenAI calls it; stop and length are called so here too
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_LONG = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Running(Protocol):
    """What is asked of the service at the time of reading."""

    open: set[Text]
    events: Sequence[DrafterEvent]

    @property
    def degraded(self) -> bool: ...

    @property
    def running(self) -> int: ...

    @property
    def cache_share(self) -> float: ...


class Metrics:
    """Of one server. Its methods are the event loop's."""

    def __init__(self, model: str, service: Running):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        self._children: dict[tuple[Counter, str], Any] = {}
        self._gauges(service)
        self.drafts = self._counter("vllm:spec_decode_num_drafts", "passes that have verified guesses")
        self.draft_tokens = self._counter("vllm:spec_decode_num_draft_tokens", "guesses that were verified")
        self.accepted = self._counter("vllm:spec_decode_num_accepted_tokens", "of those: the target's own pick")
        self._by_position = self._counts(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "the same by place after the root", "position"
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "tokens of prompts")
        self.tokens = self._counter("vllm:generation_tokens", "tokens written")
        self._ended = self._counts("vllm:request_success", "texts that are over", "finished_reason")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "from the request", _SECONDS)
        self.between = self._histogram("vllm:inter_token_latency_seconds", "between the tokens of passes", _SECONDS)
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "of a whole text", _LONG)
        self.queued = self._histogram("vllm:request_queue_time_seconds", "until a place was free", _LONG)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "from place to first token", _LONG)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "from first token to last", _LONG)
        self.prompt_sizes = self._histogram("vllm:request_prompt_tokens", "of a prompt", _TOKENS)
        self.text_sizes = self._histogram("vllm:request_generation_tokens", "of a text", _TOKENS)
        self._roots = self._counts("pearl_roots", "new roots after a pass: guessed before or not", "outcome")
        self.prepared = self._counter("pearl_misses_prepared", "corrections that were another guess")
        self._busy = self._counts("pearl_busy_seconds", f"of forwards; {_LATE}", "role")
        self._waiting = self._counts("pearl_waiting_seconds", f"of waiting for the other side; {_LATE}", "role")
        self._origins = self._counts("pearl_tokens", "tokens written, by who had guessed them", "origin")
        self._refused = self._counts("pearl_requests_refused", "answers other than 2xx", "status")

    def _gauges(self, service: Running) -> None:
        running = self._gauge("vllm:num_requests_running", "texts that have a place")
        running.set_function(lambda: service.running)
        waiting = self._gauge("vllm:num_requests_waiting", "texts that wait for one")
        waiting.set_function(lambda: max(0, len(service.open) - service.running))
        self._gauge("vllm:kv_cache_usage_perc", "share of the cache in use").set_function(lambda: service.cache_share)
        self._gauge("pearl_drafter_lost", "1: the target goes on alone").set_function(lambda: float(service.degraded))
        restarts = self._gauge("pearl_drafter_restarts", "times that a lost drafter has come back")
        restarts.set_function(lambda: sum(one.kind == "back" for one in service.events))

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(name, help, [*self._labels], registry=self.registry).labels(**self._labels)

    def _counts(self, name: str, help: str, label: str) -> Counter:
        return Counter(name, help, [*self._labels, label], registry=self.registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, [*self._labels], registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(name, help, [*self._labels], buckets=buckets, registry=self.registry)
        return made.labels(**self._labels)

    def _of(self, counts: Counter, **label: str) -> Any:
        """Looked up once: this is asked several times a pass."""
        ((_, value),) = label.items()
        found = self._children.get((counts, value))
        if found is None:
            found = self._children[counts, value] = counts.labels(**self._labels, **label)
        return found

    def refused(self, status: int) -> None:
        self._of(self._refused, status=str(status)).inc()

    def hear(self, text: Text, said: Said) -> None:
        """After the text has noted it."""
        if isinstance(said, list):
            self._pass(text, said)
        elif isinstance(said, Generation):
            self._end(text, said)
        else:
            self._of(self._ended, finished_reason="error").inc()

    def _pass(self, text: Text, tokens: list[int]) -> None:
        self.tokens.inc(len(tokens))
        if text.heard == 1:
            self.first_token.observe(text.last - text.arrived)
            self.prompt_tokens.inc(len(text.handle.prompt))
        else:
            self.between.observe(text.last - text.before)
        one = text.latest
        if not one:
            return
        for origin, count in collections.Counter(one.origins).items():
            self._of(self._origins, origin=origin or TARGET).inc(count)
        self._of(self._busy, role="target").inc(one.forward_s / one.texts)
        self._of(self._waiting, role="target").inc(one.waited_s / one.texts)
        if one.verified:
            self.drafts.inc()
            self.draft_tokens.inc(one.offered)
            self.accepted.inc(one.accepted_rows)
            for position in range(one.accepted_rows):
                self._of(self._by_position, position=str(position)).inc()
        if one.offered or one.tested:  # or a guess came while the pass ran
            self._of(self._roots, outcome="hit" if one.hit else "miss").inc()
            self.prepared.inc(bool(one.judged) and one.judged[-1].rank not in (0, None))

    def _end(self, text: Text, whole: Generation) -> None:
        reason = FINISH.get(whole.finish_reason, whole.finish_reason)
        self._of(self._ended, finished_reason=reason).inc()
        self.whole.observe(text.ended_s - text.arrived)
        self.prompt_sizes.observe(whole.stats.prompt_tokens)
        self.text_sizes.observe(len(whole.tokens))
        if text.placed is not None and text.first is not None:
            self.queued.observe(max(0.0, text.placed - text.arrived))
            self.prefill.observe(text.first - text.placed)
            self.decode.observe(text.last - text.first)
        if drafter := whole.stats.drafter:
            self._of(self._busy, role="drafter").inc(drafter.busy_s)
            self._of(self._waiting, role="drafter").inc(drafter.waiting_s)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def speculation(passes: Iterable[Pass], detailed: bool = False) -> dict[str, Any]:
    """vLLM's `metrics.speculative_decoding` of one text: what was drafted and accepted, step by step. A step is a
    verification. A tree verifies more guesses than can be accepted: all of them count as drafted. vLLM's histogram by
    draft length is left out: the lists of steps say the same."""
    steps = [(one.accepted_rows, one.offered) for one in passes if one.verified]
    accepted, drafted = (sum(column) for column in zip(*steps, strict=True)) if steps else (0, 0)
    most = max((drafted for _, drafted in steps), default=0)
    found: dict[str, Any] = {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "acceptance_histogram": [sum(one == count for one, _ in steps) for count in range(most + 1)],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": most,
    }
    if detailed:
        found["per_step_accepted"] = [one for one, _ in steps]
        found["per_step_drafted"] = [drafted for _, drafted in steps]
    return found
