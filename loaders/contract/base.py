"""The contract between a back-end and everything above it.

A back-end writes two small classes: a `Loader` (can it, how much memory, load) and a
`LoadedModel` with `_steps`, which turns token ids into token ids on the worker thread.
Templates, text, stop strings, queueing and timing are given here once. An engine that
speaks text itself (remote) overrides `chat` and `complete` instead.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from ...core.chat import Finish, Message, Step, Token
from ...core.errors import BadParameter
from ...core.models import LocalModel
from ...core.params import GenerationParams
from ..text.answer_ids import Spoken, offsets
from ..text.chat_template import ChatTemplate
from ..text.detokenize import Detokenizer
from ..text.stop_strings import StopStrings
from .worker import Stream, Worker

LoadProgress = Callable[[float, str], None]  # share done in 0..1, what is being done in a user's words


@dataclass(frozen=True)
class Refusal:
    """Why a loader does not take a model, and what would change that."""

    reason: str  # "needs an NVIDIA card"
    cure: str = ""  # "pip install exllamav2"

    def __str__(self) -> str:
        return f"{self.reason} ({self.cure})" if self.cure else self.reason


@dataclass(frozen=True)
class Remark:
    """What the user should know before a loader is used that can open the model."""

    text: str  # "would compile for about two minutes first"
    wait_s: float = 0.0  # before the first load; a loader that has to wait is not chosen by itself while another need not


class Loader(Protocol):
    """May also have, as fast as `refusal`: `remark(model, options) -> Remark | None`, and `without_effect(model, options)`,
    which tells of options that would change nothing for the model why that is so."""

    name: ClassVar[str]
    options: ClassVar[type]  # a dataclass; the panel and the saved settings are made from its fields

    def refusal(self, model: LocalModel, options: Any) -> Refusal | None:
        """Fast: looks at files and at what is installed (`find_spec`), imports no CUDA."""

    def needs_bytes(self, model: LocalModel, options: Any) -> int:
        """Memory for weights, conversation and overhead, in bytes, before loading."""

    def load(self, model: LocalModel, options: Any, progress: LoadProgress) -> "LoadedModel":
        """Raises GptqWebuiError with a sentence; leaves nothing behind if it does."""


class LoadedModel(ABC):
    """A model in memory. Every method may be called from any thread; the computing happens on one."""

    model: LocalModel
    tokenizer: Any = None  # a transformers tokenizer, or None
    context_tokens: int
    context_reason: str = ""  # why it is not longer: "fits in the free memory"
    parallel: int = 1  # answers computed at once
    can: frozenset[str] = frozenset()  # names of the GenerationParams it obeys
    hf: Any = None  # a PreTrainedModel face, or None
    template: ChatTemplate
    notes: tuple[str, ...] = ()  # what the user should know about this load
    device: str = "cpu"
    way: str = ""  # of computing, where the loader has several: "cuda"

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel
        self._worker = Worker(parallel)
        self._tokenizing = threading.Lock()  # fast tokenizers raise "Already borrowed" when shared
        self._spoken = Spoken()

    @abstractmethod
    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        """Tokens for a prompt of ids, then one Finish with reason and token counts. Runs on the
        worker thread, ends within one token of `cancel`, leaves out the end token itself. With more
        than one slot, None says "nothing yet": the answers computed beside it may go on."""

    def check(self, params: GenerationParams) -> None:
        """Raises BadParameter for what would not be obeyed and cannot be left out: a form that the answer must have.

        May take a second; it is done again when the answer begins, which then takes no time.
        """
        if params.grammar is not None and "grammar" not in self.can:
            raise BadParameter(
                f"{self.model.name} is loaded in a way that cannot hold an answer to a form. "
                "Load it with the loader transformers, or ask for the form in the prompt and check the answer."
            )

    def _is_alone(self, params: GenerationParams) -> bool:
        """Whether an answer cannot be computed beside others."""
        return False

    def _note_reading(self, read_tokens: int, prompt_tokens: int) -> None:
        """For `_steps`: how much of its prompt is read by now, what was known already included."""
        self._worker.note_reading(read_tokens, prompt_tokens)

    def close(self) -> None:
        """End what is running, wait for it, free the memory. Safe to call twice."""
        self._worker.close()

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return self._worker.alive

    @property
    def waiting(self) -> int:
        """Answers asked for and not finished."""
        return self._worker.waiting

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Text to ids. With `bos`, exactly one beginning-of-sequence token if the model uses one."""
        with self._tokenizing:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            first = self._bos_id() if bos else None
        if first is not None and ids[:1] != [first]:
            ids.insert(0, first)
        return ids

    def _bos_id(self) -> int | None:
        """The id this tokenizer begins a sequence with, None if it does not."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        begins = self.tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [bos]
        return bos if bos is not None and (begins or getattr(self.tokenizer, "add_bos_token", False)) else None

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the model was taught to read it. Ending in an assistant's message, it is continued.

        Answers of this model that stand in it unedited keep the ids they were drawn with.
        """
        return self._ids_of(self.template.render(messages, self.tokenizer))

    def _ids_of(self, prompt: str) -> list[int]:
        """As `encode`, with the ids of what the model said itself."""
        with self._tokenizing:
            found = offsets(self.tokenizer, prompt)
        spliced = self._spoken.spliced(prompt, *found) if found is not None else None
        return spliced if spliced is not None else self.encode(prompt)

    def generate(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Stream[Step | Finish]:
        """Ids in, Steps out, one Finish last; the turn is taken now, the computing follows in order."""
        self.check(params)
        asked = time.perf_counter()

        def make() -> Iterator[Step | Finish | None]:
            return _timed(self._steps(ids, params, cancel), asked)

        return self._worker.stream(make, cancel, _cancelled(len(ids)), alone=self._is_alone(params))

    def chat(self, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        """The next assistant message (or the rest of it): Tokens of settled text, one Finish last."""
        fresh = not messages or messages[-1].role != "assistant"
        prompt = self.template.render(messages, self.tokenizer)
        return self._text(prompt, params, cancel, self.template.stop, strip=fresh)

    def complete(self, prompt: str, params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        """What follows a plain text, without a template."""
        return self._text(prompt, params, cancel, ())

    def _text(
        self,
        prompt: str,
        params: GenerationParams,
        cancel: threading.Event,
        template_stop: Sequence[str],
        strip: bool = False,  # white space before the first word belongs to the template, not to the answer
    ) -> Stream[Token | Finish]:
        self.check(params)
        asked = time.perf_counter()
        if params.grammar is not None:  # says itself where the answer begins and ends
            template_stop, strip = (), False
        stop = (*params.stop, *(each for each in template_stop if each not in params.stop))

        ids = self._ids_of(prompt)
        inner = StopFlag(cancel)

        def answer() -> Iterator[Token | Finish | None]:
            steps = _timed(self._steps(ids, params, inner), asked)
            events = _settled(steps, Detokenizer(self.tokenizer, ids), StopStrings(stop), inner)
            return self._remembered(prompt, ids, _stripped(events) if strip else events)

        return self._worker.stream(answer, cancel, _cancelled(len(ids)), alone=self._is_alone(params))

    def _remembered(
        self, prompt: str, ids: list[int], events: Iterator[Token | Finish | None]
    ) -> Iterator[Token | Finish | None]:
        """Pass an answer on, and keep its ids for the prompts that will hold it."""
        said: list[int] = []
        shown: list[str] = []
        try:
            for event in events:
                if isinstance(event, Token):
                    shown.append(event.text)
                    if event.id >= 0:
                        said.append(event.id)
                elif isinstance(event, Finish) and said:
                    self._spoken.remember(prompt, ids, said, "".join(shown), self._decode)
                yield event
        finally:
            if hasattr(events, "close"):
                events.close()

    def _decode(self, ids: Sequence[int]) -> str:
        with self._tokenizing:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopFlag(threading.Event):
    """Set by its parent or by us: a stop string ends the computing without touching the caller's flag."""

    def __init__(self, parent: threading.Event) -> None:
        super().__init__()
        self._parent = parent

    def is_set(self) -> bool:
        return super().is_set() or self._parent.is_set()


def _cancelled(prompt_tokens: int) -> Finish:
    return Finish("cancelled", prompt_tokens=prompt_tokens)


def _timed(steps: Iterator[Step | Finish | None], asked: float) -> Iterator[Step | Finish | None]:
    """Fill in the Finish's times and count. Runs on the worker, so that a slow reader costs nothing."""
    began = last = time.perf_counter()
    first: float | None = None
    count = 0
    for event in steps:
        if isinstance(event, Finish):
            prefill_s = (first if first is not None else time.perf_counter()) - began
            generate_s = last - first if first is not None else 0.0
            yield replace(event, new_tokens=count, prefill_s=prefill_s, generate_s=generate_s, wait_s=began - asked)
            return
        if event is not None:
            count += 1
            last = time.perf_counter()
            first = last if first is None else first
        yield event


def _settled(
    steps: Iterator[Step | Finish | None], text: Detokenizer, stop: StopStrings, ended: threading.Event
) -> Iterator[Token | Finish | None]:
    """Ids to text. Text that may still become a stop string or half a character is held back."""
    for event in steps:
        if event is None:
            yield None
        elif isinstance(event, Step):
            if not stop.found:
                yield Token(event.id, stop.feed(text.feed(event.id)), event.logprob, event.top)
                if stop.found:
                    ended.set()
        else:
            rest = stop.feed(text.end()) + stop.end()
            if rest:
                yield Token(-1, rest)
            yield replace(event, reason="stop", stop_string=stop.found) if stop.found else event


def _stripped(events: Iterator[Token | Finish | None]) -> Iterator[Token | Finish | None]:
    begun = False
    for event in events:
        if isinstance(event, Token) and not begun:
            event = replace(event, text=event.text.lstrip())
            begun = bool(event.text)
        yield event
