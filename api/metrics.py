"""Figures for Prometheus at /metrics, under the names TGI gives them where it has one.

The text format is a few lines; a client library would add `_total` to TGI's names.
"""

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

from ..core.chat import Finish

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_PER_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Histogram:
    def __init__(self, name: str, help: str, bounds: Iterable[float]) -> None:
        self.name, self.help, self.bounds = name, help, tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield f'{self.name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}'
        yield f"{self.name}_sum {self.sum:.6g}"
        yield f"{self.name}_count {total}"


class Metrics:
    """Counts what happened; `gauges` are asked when somebody looks. Safe from several threads."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]] | None = None) -> None:
        self._lock = threading.Lock()
        self._gauges = dict(gauges or {})
        self._began = time.time()
        self._asked: dict[str, int] = {}  # by protocol
        self._failed: dict[str, int] = {}  # by kind of problem
        self._success = self._cancelled = self._prompt_tokens = self._cached_tokens = self._new_tokens = 0
        self._duration = Histogram("tgi_request_duration", "Seconds from asking to the last token.", _SECONDS)
        self._queued = Histogram("tgi_request_queue_duration", "Seconds in the line.", _SECONDS)
        self._inference = Histogram("tgi_request_inference_duration", "Seconds of computing.", _SECONDS)
        self._per_token = Histogram("tgi_request_mean_time_per_token_duration", "Seconds a token of one answer.", _PER_TOKEN)
        self._first = Histogram("gptq_webui_time_to_first_token_seconds", "Seconds from asking to the first token.", _SECONDS)
        self._input = Histogram("tgi_request_input_length", "Tokens of the prompt.", _TOKENS)
        self._generated = Histogram("tgi_request_generated_tokens", "Tokens of the answer.", _TOKENS)

    def asked(self, protocol: str) -> None:
        with self._lock:
            self._asked[protocol] = self._asked.get(protocol, 0) + 1

    def failed(self, kind: str) -> None:
        with self._lock:
            self._failed[kind] = self._failed.get(kind, 0) + 1

    def answered(self, finish: Finish, queue_s: float, total_s: float) -> None:
        with self._lock:
            self._prompt_tokens += finish.prompt_tokens
            self._cached_tokens += finish.cached_tokens
            self._new_tokens += finish.new_tokens
            if finish.reason == "cancelled":
                self._cancelled += 1
                return
            self._success += 1
            self._duration.add(total_s)
            self._queued.add(queue_s)
            self._inference.add(finish.prefill_s + finish.generate_s)
            self._first.add(queue_s + finish.first_token_s)
            self._input.add(finish.prompt_tokens)
            self._generated.add(finish.new_tokens)
            if finish.new_tokens:
                self._per_token.add((finish.prefill_s + finish.generate_s) / finish.new_tokens)

    def text(self) -> str:
        lines: list[str] = []

        def counter(name: str, help: str, values: Mapping[str, float]) -> None:
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} counter"))
            lines.extend(
                f"{name}{labels} {value:g}" if value < 1e6 else f"{name}{labels} {int(value)}" for labels, value in values.items()
            )

        with self._lock:
            asked = {f'{{protocol="{name}"}}': float(count) for name, count in sorted(self._asked.items())}
            failed = {f'{{err="{name}"}}': float(count) for name, count in sorted(self._failed.items())}
            counter("tgi_request_count", "Requests for an answer, by protocol.", asked)
            counter("tgi_request_success", "Answers that were completed.", {"": self._success})
            counter("tgi_request_failure", "Requests that got an error, by kind.", failed)
            counter("gptq_webui_request_cancelled", "Answers that were ended by the one who asked.", {"": self._cancelled})
            counter("gptq_webui_prompt_tokens", "Tokens of prompts.", {"": self._prompt_tokens})
            counter("gptq_webui_cached_prompt_tokens", "Of these, not computed again.", {"": self._cached_tokens})
            counter("gptq_webui_generated_tokens", "Tokens of answers.", {"": self._new_tokens})
            histograms = (
                self._duration,
                self._queued,
                self._inference,
                self._per_token,
                self._first,
                self._input,
                self._generated,
            )
            for each in histograms:
                lines.extend(each.lines())
        for name, (help, value) in self._gauges.items():
            lines.extend((f"# HELP {name} {help}", f"# TYPE {name} gauge", f"{name} {value():.10g}"))
        return "\n".join(lines) + "\n"
