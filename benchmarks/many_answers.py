"""Many answers at once on one GPU: `python benchmarks/many_answers.py [--layers N] [--rows 1 16 128] [--what …]`.

Random weights of Mistral 7B's shape, prompts of 512 tokens and 257 tokens of answer (129 of more than 16 answers, as vLLM's
figures were taken), through the worker as a server has it: tokens a second together, 64 requests whole, how long 16 streams
pause while a prompt of 3,840 tokens is read beside them, and how long prompts take to their first token.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from random_models import MISTRAL_7B, random_models  # noqa: E402

from gptq_webui.core.chat import Step  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda.cuda_stepper import CudaStepper  # noqa: E402
from gptq_webui.gptq.generation import generate  # noqa: E402
from gptq_webui.gptq.prefix_cache import PrefixCache  # noqa: E402
from gptq_webui.loaders.contract.worker import Worker  # noqa: E402
from gptq_webui.loaders.machine.memory_release import leave_out_of_collections  # noqa: E402

CONTEXT, PROMPT, TOKENS, TOKENS_OF_MANY = 8192, 512, 257, 129
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
MODEL_CARD: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}


class Server:
    """A stepper and its worker, and when each token came."""

    def __init__(self, layers: int, parallel: int) -> None:
        with torch.inference_mode():
            parts = random_models(**{**MISTRAL_7B, "layers": layers})
            self.stepper = CudaStepper(parts, CONTEXT, parallel=parallel)
        self.prefix = PrefixCache()
        self.stepper.page_room.prefix = self.prefix
        self.worker = Worker(self.stepper.parallel)
        self._random = torch.Generator().manual_seed(0)
        leave_out_of_collections()  # as after every load

    def ids(self, count: int) -> list[int]:
        found: list[int] = torch.randint(300, 32000, (count,), generator=self._random).tolist()
        return found

    def ask(self, ids: list[int], tokens: int, **params: Any) -> "Asked":
        return Asked(self, ids, GenerationParams(max_new_tokens=tokens, **{**GREEDY, **params}))


class Asked:
    """A running request; `times` of its tokens on time.perf_counter()."""

    def __init__(self, server: Server, ids: list[int], params: GenerationParams) -> None:
        self.began, self.times = time.perf_counter(), list[float]()
        cancel = threading.Event()

        def make() -> Iterator[Any]:
            events = generate(
                server.stepper, ids, params, cancel, prefix=server.prefix, end_ids=(), context_tokens=CONTEXT
            )  # fmt: skip
            for event in events:
                if isinstance(event, Step):
                    self.times.append(time.perf_counter())
                yield event

        self.stream = server.worker.stream(make, cancel, None)

    def read(self) -> None:
        for _event in self.stream:
            pass

    @property
    def rate(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def together(server: Server, count: int, **params: Any) -> float:
    """The rates of answers that run side by side, added up."""
    tokens = TOKENS if count <= 16 else TOKENS_OF_MANY
    asked = [server.ask(server.ids(PROMPT), tokens, **params) for _ in range(count)]
    for each in asked:
        each.read()
    last_first = max(each.times[0] for each in asked)
    end = min(each.times[-1] for each in asked)
    written = sum(sum(last_first < at <= end for at in each.times) for each in asked)
    server.prefix.clear()
    return written / (end - last_first) if end > last_first else sum(each.rate for each in asked)


def whole(server: Server, count: int) -> tuple[float, float]:
    """Tokens a second from the first request to the last token, and the median time to the first token."""
    began = time.perf_counter()
    asked = [server.ask(server.ids(PROMPT), TOKENS) for _ in range(count)]
    for each in asked:
        each.read()
    took = time.perf_counter() - began
    server.prefix.clear()
    return count * TOKENS / took, sorted(each.times[0] - each.began for each in asked)[count // 2]


def to_first_token(server: Server, tokens: int) -> float:
    """Seconds of a prompt alone, the median of five after the first."""
    found = []
    for _ in range(6):
        asked = server.ask(server.ids(tokens), 1)
        asked.read()
        server.prefix.clear()
        found.append(asked.times[0] - asked.began)
    return sorted(found[1:])[2]


def pauses(server: Server, streams: int, prompt: int) -> tuple[float, float, float]:
    """Longest pause of a stream before and while a long prompt is read beside them, and the time to that prompt's first token."""
    asked = [server.ask(server.ids(PROMPT), 400) for _ in range(streams)]
    while any(len(each.times) < 50 for each in asked):
        time.sleep(0.002)
    came = time.perf_counter()
    late = server.ask(server.ids(prompt), 8)
    for each in (late, *asked):
        each.read()
    server.prefix.clear()
    gaps = [(after, after - before) for each in asked for before, after in pairwise(each.times[10:])]
    beside = [gap for after, gap in gaps if came < after < late.times[-1]]
    return max(gap for after, gap in gaps if after <= came), max(beside), late.times[0] - late.began


def shared(server: Server, count: int, beginning: int) -> tuple[float, float]:
    """Seconds of requests that begin with the same text, and the MB that all of them held at most."""
    system = server.ids(beginning)
    began = time.perf_counter()
    asked = [server.ask(system + server.ids(100), 64) for _ in range(count)]
    most = 0
    while any(len(each.times) < 60 for each in asked):
        most = max(most, server.stepper._step.pages.used_bytes)
        time.sleep(0.01)
    for each in asked:
        each.read()
    took = time.perf_counter() - began
    server.prefix.clear()
    return took, most / 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 128])
    options.add_argument("--what", nargs="*", default=["together", "sampled", "prompts", "whole", "pauses", "shared"])
    given = options.parse_args()
    server = Server(given.layers, max(16, *given.rows))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.layers} layers", flush=True)
    if "together" in given.what:
        for rows in given.rows:
            together(server, rows)  # records the graphs
            print(f"{rows:4} answers at once: {together(server, rows):8.0f} tokens/s together", flush=True)
    if "sampled" in given.what:
        rows = max(given.rows)
        print(f"{rows:4} answers, the model card's sampling: {together(server, rows, **MODEL_CARD):8.0f} tokens/s", flush=True)
        print(f"{rows:4} answers with log-probabilities: {together(server, rows, logprobs=3):8.0f} tokens/s", flush=True)
    if "prompts" in given.what:
        for tokens in (3840, 512, 64):  # the first has weights made dense, and kept
            print(f"prompt of {tokens}: {to_first_token(server, tokens) * 1e3:.1f} ms to its first token", flush=True)
    if "whole" in given.what:
        whole(server, 64)  # compiles kernels and records graphs, and learns how long prompts take
        rate, first = sorted(whole(server, 64) for _ in range(3))[1]
        print(f"64 requests of {PROMPT} + {TOKENS}, whole: {rate:.0f} tokens/s, median first token {first:.2f} s", flush=True)
    if "pauses" in given.what:
        for _ in range(2):
            before, beside, first = pauses(server, 16, 3840)
            print(
                f"16 streams: longest pause {before * 1e3:.1f} ms; while a prompt of 3840 is read {beside * 1e3:.1f} ms; "
                f"its first token after {first * 1e3:.0f} ms", flush=True,
            )  # fmt: skip
    if "shared" in given.what:
        took, most = shared(server, 64, 2000)
        own = 64 * 2164 * server.stepper._step.pages.page_bytes / 64e6
        print(
            f"64 requests that begin with the same 2000 tokens: {took:.2f} s, {most:.0f} MB (each its own: {own:.0f})", flush=True
        )
    server.worker.close()
    server.stepper.close()


if __name__ == "__main__":
    main()
