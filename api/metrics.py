"""Figures for Prometheus at /metrics, under the names that TGI gives them where it has one."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from ..core.chat import Finish

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_PAUSES = (*_PER_TOKEN, 0.0025, 0.0075, 0.015, 0.03, 0.075, 0.15, 0.3, 0.75, 2.5, 10.0)
_REMEMBERED = 4096  # the last pauses and first words, of which the 95th percentile is told


class Metrics:
    """Counts events. The functions in `gauges`, by name with a help text, are called for each report. Thread-safe."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None) -> None:
        disable_created_metrics()  # otherwise each counter and histogram adds a `_created` line, which TGI does not have
        self._registry = registry = CollectorRegistry()
        self._asked = Counter("tgi_request_count", "Requests for an answer, by protocol.", ["protocol"], registry=registry)
        self._failed = Counter("tgi_request_failure", "Requests that got an error, by kind.", ["err"], registry=registry)

        def counter(name: str, help: str) -> Counter:
            return Counter(name, help, registry=registry)

        def histogram(name: str, help: str, bounds: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, buckets=sorted(bounds), registry=registry)

        self._success = counter("tgi_request_success", "Completed answers.")
        self._cancelled = counter("gptq_webui_request_cancelled", "Answers that the client ended.")
        self._prompt_tokens = counter("gptq_webui_prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("gptq_webui_cached_prompt_tokens", "Tokens of prompts that were not computed again.")
        self._new_tokens = counter("gptq_webui_generated_tokens", "Tokens of answers.")
        self._duration = histogram("tgi_request_duration", "Seconds from the request to the last token.", _SECONDS)
        self._queued = histogram("tgi_request_queue_duration", "Seconds in the queue.", _SECONDS)
        self._inference = histogram("tgi_request_inference_duration", "Seconds of computing.", _SECONDS)
        self._per_token = histogram("tgi_request_mean_time_per_token_duration", "Mean seconds per token.", _PER_TOKEN)
        self._first = histogram("gptq_webui_time_to_first_token_seconds", "Seconds to the first token.", _SECONDS)
        self._pause = histogram("gptq_webui_inter_token_latency_seconds", "Seconds between two tokens of an answer.", _PAUSES)
        self._firsts: deque[float] = deque(maxlen=_REMEMBERED)
        self._pauses: deque[float] = deque(maxlen=_REMEMBERED)
        last = f"95 % of the last {_REMEMBERED:,}"
        for name, text, values in (
            ("gptq_webui_time_to_first_token_p95_seconds", f"{last} answers began within so many seconds.", self._firsts),
            ("gptq_webui_inter_token_latency_p95_seconds", f"{last} pauses between tokens were not longer.", self._pauses),
        ):
            Gauge(name, text, registry=registry).set_function(partial(_p95, values))
        self._input = histogram("tgi_request_input_length", "Tokens of the prompt.", _TOKENS)
        self._generated = histogram("tgi_request_generated_tokens", "Tokens of the answer.", _TOKENS)
        for name, (help, value) in (gauges or {}).items():
            Gauge(name, help, registry=registry).set_function(value)

    def asked(self, protocol: str) -> None:
        self._asked.labels(protocol).inc()

    def failed(self, kind: str) -> None:
        self._failed.labels(kind).inc()

    def paused(self, seconds: float) -> None:
        """Between two tokens of one answer."""
        self._pause.observe(seconds)
        self._pauses.append(seconds)

    def answered(self, finish: Finish, queue_s: float, total_s: float) -> None:
        self._prompt_tokens.inc(finish.prompt_tokens)
        self._cached_tokens.inc(finish.cached_tokens)
        self._new_tokens.inc(finish.new_tokens)
        if finish.reason == "cancelled":
            self._cancelled.inc()
            return
        self._success.inc()
        self._duration.observe(total_s)
        self._queued.observe(queue_s)
        self._inference.observe(finish.prefill_s + finish.generate_s)
        self._first.observe(queue_s + finish.first_token_s)
        self._firsts.append(queue_s + finish.first_token_s)
        self._input.observe(finish.prompt_tokens)
        self._generated.observe(finish.new_tokens)
        if finish.new_tokens:
            self._per_token.observe((finish.prefill_s + finish.generate_s) / finish.new_tokens)

    def text(self) -> str:
        """The report in Prometheus' text format."""
        report = generate_latest(self._registry).decode()
        # The library ends every counter's name in `_total`, a custom collector's too; TGI's dashboards ask for the bare names.
        return re.sub(r"^((?:# (?:HELP|TYPE) )?\w+)_total\b", r"\1", report, flags=re.MULTILINE)


def _p95(values: Iterable[float]) -> float:
    """The 95th percentile: the smallest value that 95 of 100 do not exceed; 0 without values."""
    found = sorted(values)
    return found[-(-95 * len(found) // 100) - 1] if found else 0.0
