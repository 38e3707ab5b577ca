"""How well the loaded model predicts a text: perplexity, by the kernel that answers use.

engine/evaluation.py measures folders instead, with plain packed layers, and compares two of them. Both cut a text as
gptq/text_windows.py does.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..core.chat import Finish
from ..core.errors import BadParameter, Busy
from ..core.units import plural
from ..gptq.text_windows import perplexity_of, windows_of
from ..loaders.contract.base import LoadedModel, StopFlag
from .engine import Engine
from .measured_quality import Figure, digest_of, remember

WINDOW, TOKENS = 1024, 8192  # the usual ones

Progress = Callable[[str], None]  # hears the current step


@dataclass(frozen=True)
class Perplexity:
    model: str
    text: str  # what it was measured on
    tokens: int  # that count
    perplexity: float
    window: int
    stride: int
    kernel: str
    digest: str = ""  # of the windows

    def __str__(self) -> str:
        return (
            f"{self.model}: perplexity {self.perplexity:.4f} over {self.tokens:,} tokens of {self.text} "
            f"(windows of {self.window}, stride {self.stride}, {self.kernel})"
        )


def measure(
    engine: Engine,
    text: str,
    name: str,  # of the text, for the result
    cancel: threading.Event,
    *,
    window: int | None = None,  # None: 1,024, or the context if that is shorter
    stride: int | None = None,  # None: half a window
    tokens: int | None = None,  # of the text, at most; None: all
    progress: Progress = lambda text: None,
) -> Perplexity | None:
    """Measure the loaded model, and remember the figure; None if cancelled.

    Raises NotLoaded, BadParameter, Busy, AnswerFailed.
    """
    loaded = engine.ready()
    width = window or min(WINDOW, loaded.context_tokens)
    if not 2 <= width <= loaded.context_tokens:
        raise BadParameter(
            f"A window must have 2 tokens or more, and fit into the context of {loaded.context_tokens:,}.", "window"
        )
    if loaded.is_remote or "logprobs" not in loaded.can:
        raise BadParameter(f"{loaded.model.name} is opened by a loader that gives no log-probabilities. Choose transformers.")
    step = stride or max(1, width // 2)
    begin = loaded.codec.with_bos([])
    if not 1 <= step <= width:
        raise BadParameter(f"The stride must be 1 or more, and at most the window, which is {width}.", "stride")
    ids = loaded.encode(text, bos=False)[:tokens]
    windows = windows_of(ids, width, step, begin)
    if not windows:
        raise BadParameter(f"The text has {plural(len(ids), 'token')}, too few to predict one. Give a longer text.", "text")
    total, count = 0.0, 0
    for at, each in enumerate(windows):
        if engine.loaded is not loaded:
            raise Busy("Another model was loaded while this one was measured. Measure again.")
        so_far = f", perplexity {perplexity_of(total, count):.2f} so far" if count else ""
        progress(f"Window {at + 1} of {len(windows)}{so_far}")
        found = _logprobs(engine, each.ids, cancel)
        if found is None:
            return None
        total += sum(found[-each.counted :])
        count += each.counted
    digest = digest_of(each.ids for each in windows)
    measured = Perplexity(loaded.model.name, name, count, perplexity_of(total, count), width, step, _kernel(loaded), digest)
    remember(loaded.model, perplexity=Figure(measured.perplexity, name, digest, count))
    return measured


def _logprobs(engine: Engine, ids: tuple[int, ...], cancel: threading.Event) -> list[float] | None:
    """Of each id after the first; None if cancelled."""
    found: list[float] = []
    for event in engine.score(ids, 0, StopFlag(cancel)):
        if isinstance(event, Finish):
            return None if event.reason == "cancelled" else found
        if event.logprob is not None:
            found.append(event.logprob)
    return None


def _kernel(loaded: LoadedModel) -> str:
    return f"{loaded.kernel or 'transformers'} on {loaded.device}"
