"""How fast the loaded model is on this machine, in one line to paste. A few seconds, through the Engine like any answer.

The rounds stand in line with everybody's answers, one at a time, and each reads a prompt of its own: what was read
for an earlier one would not be read again.
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
_FIRST_TOKENS = 16  # of the first round, which tells how many are worth waiting for
_MOST_TOKENS = 256
_ROUND_S = 1.2  # of writing
_ROUNDS = 4
_ENOUGH_S = 5.0  # no further round is begun after this
_PASSAGE = (
    "The sun rises in the east and sets in the west. In the morning people get up, wash themselves, have breakfast and go "
    "to work. In the evening they come home, eat dinner with their family, read a book and go to bed. "
)

Told = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Medians over the rounds; `str` is the line."""

    model: str
    badge: str  # "GPTQ 4-bit, group 32, act-order"
    loader: str  # with its way of computing and the options that differ
    device: str  # name of the card or the processor
    tokens_per_s: float
    prompt_tokens: int
    prompt_tokens_per_s: float
    first_token_s: float  # without the wait for others
    memory: str
    versions: tuple[str, ...]
    rounds: int = 1
    shared: bool = False  # other answers were computed meanwhile

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


def measure(engine: Engine, cancel: threading.Event, told: Told = lambda text: None) -> Measured | None:
    """None if `cancel` ended it. `told` hears what is being done. Raises NotLoaded, BadParameter, Busy, AnswerFailed."""
    loaded = engine.ready()
    if loaded.tokenizer is None:
        raise BadParameter(f"{loaded.model.name} is computed on another machine: its speed is not this machine's.")
    ended = time.monotonic() + _ENOUGH_S
    finishes: list[Finish] = []
    shared = False
    count = _FIRST_TOKENS
    while len(finishes) < _ROUNDS and (not finishes or time.monotonic() < ended):
        if engine.loaded is not loaded:
            raise Busy("Another model was loaded while this one was measured. Measure again.")
        params = GenerationParams(temperature=0, top_p=1, top_k=0, repetition_penalty=1, max_new_tokens=count)
        answer = engine.generate(_prompt(loaded), params, StopFlag(cancel))  # a round's own: its end is not the user's
        finish, crowded = _watched(answer, loaded, len(finishes), told)
        shared |= crowded
        if finish.reason == "cancelled":
            return None
        finishes.append(finish)
        count = max(_FIRST_TOKENS, min(_MOST_TOKENS, int(_ROUND_S * finish.tokens_per_s)))
    return _summed(engine, loaded, finishes[1:] or finishes, shared)


def _prompt(loaded: LoadedModel) -> list[int]:
    """Ids of a text that begins as no other does."""
    tokens = min(PROMPT_TOKENS, max(loaded.context_tokens - _MOST_TOKENS, loaded.context_tokens // 2))
    text = f"{random.randrange(10**9)} " + _PASSAGE
    while len(ids := loaded.encode(text)) < tokens:
        text += _PASSAGE * (1 + tokens // max(1, len(ids)))
    return ids[:tokens]


def _watched(answer: Answer, loaded: LoadedModel, done: int, told: Told) -> tuple[Finish, bool]:
    """(its end, whether others were computed beside it). Tells meanwhile how far it is."""
    over = threading.Event()

    def tell() -> None:
        while True:
            reading = answer.reading
            if answer.ahead:
                told("Waiting for another answer")
            elif reading is not None and reading.read_tokens < reading.prompt_tokens and done == 0:
                told(f"Reading a prompt: {reading.read_tokens:,} of {reading.prompt_tokens:,} tokens")
            else:
                told(f"Measuring, round {done + 1} of up to {_ROUNDS}")
            if over.wait(0.2):
                return

    threading.Thread(target=tell, name="gptq-webui benchmark", daemon=True).start()
    crowded = False
    try:
        for event in answer:
            crowded |= loaded.parallel > 1 and loaded.waiting > 1
            if isinstance(event, Finish):
                return event, crowded
    finally:
        over.set()
        answer.close()
    raise AnswerFailed("The measuring ended without a result. Press Reload in the Model tab.")


def _summed(engine: Engine, loaded: LoadedModel, finishes: list[Finish], shared: bool) -> Measured:
    rates = [each.tokens_per_s for each in finishes if each.tokens_per_s]
    if not rates:
        raise AnswerFailed(f"{loaded.model.name} ended its answers at once, so there is no speed to tell.")
    first = statistics.median(each.prefill_s for each in finishes)
    read = statistics.median((each.prompt_tokens - each.cached_tokens) / max(each.prefill_s, 1e-9) for each in finishes)
    choice = engine.choice
    name = choice.loader.name if choice is not None else "?"
    more = [each for each in (loaded.way, changed_options(choice.options) if choice is not None else "") if each]
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
        return f"{format_bytes(int(taken))} of the card's memory"
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
