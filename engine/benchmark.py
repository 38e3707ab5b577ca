"""The speed of the loaded model on this machine, as one line to paste. Takes a few seconds.

Each round is an ordinary answer of the Engine and waits for its turn like any other. Each has a different prompt, since
the model does not read again what it has read before.
"""

import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..core.chat import Finish
from ..core.errors import AnswerFailed, BadParameter, Busy
from ..core.params import GenerationParams
from ..core.units import format_bytes, plural
from ..loaders.contract.base import LoadedModel, StopFlag
from ..loaders.machine.capabilities import version_of
from ..loaders.machine.gpus import gpus
from .engine import Answer, Engine
from .support_report import changed_options

PROMPT_TOKENS = 512
_FIRST_TOKENS = 16  # of the first round, which shows how many tokens fit into _ROUND_S
_MOST_TOKENS = 256
_ROUND_S = 1.2  # of writing
_ROUNDS = 4
_ENOUGH_S = 5.0  # no further round begins after this
_PASSAGE = (
    "The sun rises in the east and sets in the west. In the morning people get up, wash themselves, have breakfast and go "
    "to work. In the evening they come home, eat dinner with their family, read a book and go to bed. "
)

Progress = Callable[[str], None]  # hears the current step


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds; `str` is the line."""

    model: str
    badge: str  # "GPTQ 4-bit, group 32, act-order"
    loader: str  # with its kernel and the options that differ from their defaults
    device: str  # name of the GPU or the processor
    tokens_per_s: float
    prompt_tokens: int
    prompt_tokens_per_s: float
    first_token_s: float  # without waiting for other answers
    memory: str
    versions: tuple[str, ...]
    rounds: int = 1
    shared: bool = False  # other answers were computed at the same time

    def __str__(self) -> str:
        parts = [
            f"{self.model}: {self.badge}",
            self.loader,
            self.device,
            f"{_number(self.tokens_per_s)} tokens/s after a prompt of {self.prompt_tokens}",
            f"reads {_number(self.prompt_tokens_per_s)} tokens/s",
            f"first token after {self.first_token_s:.2f} s",
            self.memory,
            ", ".join(self.versions),
        ]
        return " | ".join([*parts, *(["while other answers were computed"] if self.shared else [])])


def measure(engine: Engine, cancel: threading.Event, progress: Progress = lambda text: None) -> Measured | None:
    """Measure the loaded model; None if cancelled. Raises NotLoaded, BadParameter, Busy, AnswerFailed."""
    loaded = engine.ready()
    if loaded.is_remote:
        raise BadParameter(
            f"{loaded.model.name} is computed on another machine, so its speed is not this machine's. "
            "Load a model on this machine."
        )
    ended = time.monotonic() + _ENOUGH_S
    finishes: list[Finish] = []
    shared = False
    count = _FIRST_TOKENS
    while len(finishes) < _ROUNDS and (not finishes or time.monotonic() < ended):
        if engine.loaded is not loaded:
            raise Busy("Another model was loaded while this one was measured. Measure again.")
        params = GenerationParams(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=count)
        answer = engine.generate(
            _prompt(loaded), params, StopFlag(cancel)
        )  # its own flag: the end of a round is not a cancel of the user
        finish, crowded = _run_round(answer, loaded, len(finishes), progress)
        shared |= crowded
        if finish.reason == "cancelled":
            return None
        finishes.append(finish)
        count = max(_FIRST_TOKENS, min(_MOST_TOKENS, int(_ROUND_S * finish.tokens_per_s)))
    return _summary(engine, loaded, finishes[1:] or finishes, shared)


def _prompt(loaded: LoadedModel) -> list[int]:
    """Ids of a text with a random beginning, so that no earlier prompt shares a prefix with it."""
    tokens = min(PROMPT_TOKENS, max(loaded.context_tokens - _MOST_TOKENS, loaded.context_tokens // 2))
    text = f"{random.randrange(10**9)} " + _PASSAGE
    while len(ids := loaded.encode(text)) < tokens:
        text += _PASSAGE * (1 + tokens // max(1, len(ids)))
    return ids[:tokens]


def _run_round(answer: Answer, loaded: LoadedModel, done: int, progress: Progress) -> tuple[Finish, bool]:
    """(the Finish, whether other answers were computed at the same time). Reports the progress meanwhile."""
    over = threading.Event()

    def report() -> None:
        while True:
            reading = answer.reading
            if answer.ahead:
                progress("Waiting for another answer")
            elif reading is not None and reading.read_tokens < reading.prompt_tokens and done == 0:
                progress(f"Reading a prompt: {reading.read_tokens:,} of {reading.prompt_tokens:,} tokens")
            else:
                progress(f"Measuring, round {done + 1} of up to {_ROUNDS}")
            if over.wait(0.2):
                return

    threading.Thread(target=report, name="gptq-webui benchmark", daemon=True).start()
    crowded = False
    try:
        for event in answer:
            crowded |= loaded.parallel > 1 and loaded.waiting > 1
            if isinstance(event, Finish):
                return event, crowded
    finally:
        over.set()
        answer.close()
    raise AnswerFailed("The measurement ended without a result. Press Reload in the Model tab.")


def _summary(engine: Engine, loaded: LoadedModel, finishes: list[Finish], shared: bool) -> Measured:
    rates = [each.tokens_per_s for each in finishes if each.tokens_per_s]
    if not rates:
        raise AnswerFailed(f"{loaded.model.name} ended its answers at once, so its speed could not be measured. Try again.")
    first = statistics.median(each.prefill_s for each in finishes)
    read = statistics.median((each.prompt_tokens - each.cached_tokens) / max(each.prefill_s, 1e-9) for each in finishes)
    choice = engine.choice
    name = choice.loader.name if choice is not None else "?"
    more = [
        each
        for each in (
            loaded.kernel if loaded.kernel != name else "",
            changed_options(choice.options) if choice is not None else "",
        )
        if each
    ]
    return Measured(
        loaded.model.name,
        loaded.model.badge,
        name + (f" ({'; '.join(more)})" if more else ""),
        _device(loaded.device),
        statistics.median(rates),
        finishes[0].prompt_tokens,
        read,
        first,
        _memory(loaded.device),
        _versions(loaded.device),
        len(finishes),
        shared,
    )


def _device(device: str) -> str:
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        return str(torch.cuda.get_device_name(torch.device(device)))
    threads = f", {plural(torch.get_num_threads(), 'thread')}" if torch is not None else ""
    return _processor() + threads


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory(device: str) -> str:
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        taken = sum(torch.cuda.memory_reserved(at) for at in range(torch.cuda.device_count()))
        return f"{format_bytes(int(taken))} of the GPU's memory"
    import psutil

    return f"{format_bytes(int(psutil.Process().memory_info().rss))} of memory"


def _versions(device: str) -> tuple[str, ...]:
    found = [f"gptq-webui {__version__}", f"Python {platform.python_version()}"]
    found += [f"{name} {version}" for name in ("torch", "transformers") if (version := version_of(name)) is not None]
    if device.startswith("cuda") and (here := gpus()):
        found.append(f"driver {here[0].driver}")
    return tuple(found)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
