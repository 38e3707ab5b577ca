"""The contract between a back-end and everything above it.

A back-end writes two small classes: a `Loader` (can it open the model, how much memory, load) and a `LoadedModel`
with `_steps`, which turns token ids into token ids on the worker thread. Templates, text, stop strings, queueing
and timing are given here once. An engine that speaks text itself (remote) overrides `prompt` and `answer` instead.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...core.chat import Finish, Message, Step, Token
from ...core.errors import BadParameter, Busy, GptqWebuiError
from ...core.model_claims import embedding_rows
from ...core.models import LocalModel, tensors_of
from ...core.params import GenerationParams
from ...core.tools import ToolUse
from ...gptq.token_ids import require_known
from ..machine import memory_fit
from ..machine.capabilities import Machine, look
from ..text import tool_prompts
from ..text.answer_ids import EarlierAnswers
from ..text.chat_template import ChatTemplate
from ..text.detokenize import Detokenizer
from ..text.stop_strings import StopStrings
from ..text.token_codec import TokenCodec
from ..text.tool_calls import CallsAfterThoughts
from .answer_events import StopFlag, cancelled, settled, timed, with_calls, without_leading_space
from .model_prompt import Prompt
from .worker import Stream, Worker

__all__ = ["LoadProgress", "LoadedModel", "Loader", "Prompt", "Refusal", "Remark", "StopFlag"]

LoadProgress = Callable[[float, str], None]  # share done in 0..1, what is being done in a user's words
_EVERYTHING = memory_fit.Memory(1 << 60, 1 << 60)


@dataclass(frozen=True)
class Refusal:
    """Why a loader does not take a model, and what would change that."""

    reason: str  # "needs an NVIDIA GPU"
    cure: str = ""  # "pip install exllamav2"

    def __str__(self) -> str:
        return f"{self.reason} ({self.cure})" if self.cure else self.reason


@dataclass(frozen=True)
class Remark:
    """What the user should know before a loader that can open the model is used."""

    text: str  # "would compile for about two minutes first"
    wait_s: float = 0.0  # before the first load; such a loader is not chosen automatically while another need not wait


class Loader(ABC):
    """A back-end. Everything but `load` is fast: it looks at files and at what is installed, and imports no CUDA."""

    name: ClassVar[str]
    options: ClassVar[type]  # a frozen dataclass; the panel and the saved settings are made from its fields
    reason: ClassVar[str] = "opens this model"  # why it is chosen where no loader before it can open the model
    automatic: ClassVar[bool] = True  # False: used only when the user chooses it
    context_option: ClassVar[str] = ""  # its option for the length of the context, if it has one

    def __init__(self, machine: Callable[[], Machine] = look) -> None:
        self._machine = machine

    @abstractmethod
    def refusal(self, model: LocalModel, options: Any) -> Refusal | None:
        """Why it cannot open the model with these options; None if it can."""

    @abstractmethod
    def load(self, model: LocalModel, options: Any, progress: LoadProgress) -> "LoadedModel":
        """Raises GptqWebuiError with a sentence; frees everything if it does."""

    def remark(self, model: LocalModel, options: Any) -> Remark | None:
        """What the user should know before it opens the model."""
        return None

    def without_effect(self, model: LocalModel, options: Any) -> dict[str, str]:
        """Options that would change nothing for this model -> why."""
        return {}

    def demand(self, model: LocalModel, options: Any, gpu: bool) -> memory_fit.Demand:
        """What these options need of the memory. `gpu`: there is one."""
        return memory_fit.Demand(on_gpu=gpu)

    def fit(self, model: LocalModel, options: Any, memory: memory_fit.Memory) -> memory_fit.Fit:
        """What the model needs with these options, compared with `memory`, before a byte is loaded."""
        return memory_fit.of(model, self.demand(model, options, memory.gpu is not None), memory)

    def needs_bytes(self, model: LocalModel, options: Any) -> int:
        """Memory for weights, conversation and computing, in bytes, before loading; 0 for a remote engine."""
        return self.fit(model, options, _EVERYTHING).needs_bytes


class LoadedModel(ABC):
    """A model in memory. Every method may be called from any thread; the computing happens on one."""

    can: frozenset[str] = frozenset()  # names of the GenerationParams it obeys
    can_embed: ClassVar[bool] = False  # it gives out its hidden states
    can_adapt: bool = False  # it takes LoRA adapters for each answer (GenerationParams.adapters)
    hf: Any = None  # a PreTrainedModel, or None
    embedding_rows: int | None = None  # ids below this can be computed; None where only the engine knows
    sees_pictures: bool = False  # reads Message.pictures
    is_remote: ClassVar[bool] = False  # computed on other machines: no tokenizer, no memory of this machine

    def __init__(
        self,
        model: LocalModel,
        tokenizer: Any,  # a transformers tokenizer; None only if `is_remote`
        template: ChatTemplate,
        *,
        context_tokens: int,
        context_reason: str = "",  # why it is not longer: "what fits in the available memory"
        notes: Sequence[str] = (),  # what the user should know about this load
        device: str = "cpu",
        kernel: str = "",  # how it computes, where the loader has several ways: "cuda"
        parallel: int = 1,  # answers computed at the same time
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.context_tokens, self.context_reason = context_tokens, context_reason
        self.notes = (*notes, template.note) if template.note else tuple(notes)
        self.device, self.kernel, self.parallel = device, kernel, parallel
        self._codec = TokenCodec(tokenizer) if tokenizer is not None else None
        self._worker = Worker(parallel)
        self.embedding_rows = None if self.is_remote else _embedding_rows(model)
        self._earlier = EarlierAnswers()

    @abstractmethod
    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        """Tokens for a prompt of ids, then one Finish with reason and token counts.

        Runs on the worker thread, ends within one token of `cancel`, leaves out the end token itself. With more than
        one answer in parallel, None says "nothing yet": the answers computed at the same time may go on.
        """

    def _steps_with(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        """As `_steps`; for a model that sees pictures, with those of the prompt."""
        return self._steps(list(prompt.ids), params, cancel)

    def _scores(self, ids: Sequence[int], top: int, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        """For a model that `can` logprobs: a Step for each id of a text, with its log-probability, then one Finish."""
        raise NotImplementedError

    def _vector(self, ids: Sequence[int], pooling: str, cancel: threading.Event) -> Generator[None, None, list[float]]:
        """For a model that `can_embed`: the last hidden states of a text as one vector of length 1. None as `_steps`."""
        raise NotImplementedError

    def _reads_alone(self) -> bool:
        """Whether texts cannot be scored and embedded at the same time as answers are computed."""
        return True

    def check(self, params: GenerationParams) -> None:
        """Raises BadParameter for a parameter that must not be ignored and that this model does not obey: a grammar, an adapter.

        May take a second. It runs again when the answer begins, which then takes no time.
        """
        if params.grammar is not None and "grammar" not in self.can:
            raise BadParameter(
                f"{self.model.name} is loaded with a loader that does not support grammars. "
                "Load it with the loader transformers, or describe the grammar in the prompt and check the answer."
            )

        if params.adapters and not self.can_adapt:
            raise BadParameter(
                f"{self.model.name} is computed in a way that takes no LoRA adapter for a single answer (our own step "
                "does). Set the adapter for the whole model in the Model tab.",
                "adapters",
            )

    def _require_ids(self, ids: Sequence[int], params: GenerationParams | None = None) -> None:
        """Raises BadParameter for a token that the model has no embedding of: on a GPU, computing it ends every later answer."""
        if params is not None and params.logit_bias:
            require_known([id for id, _bias in params.logit_bias], self.embedding_rows, "logit_bias")
        require_known(ids, self.embedding_rows)

    def _is_alone(self, params: GenerationParams) -> bool:
        """Whether an answer cannot be computed at the same time as others."""
        return False

    def _note_reading(self, read_tokens: int, prompt_tokens: int) -> None:
        """For `_steps`: how much of its prompt is read by now, cached tokens included."""
        self._worker.note_reading(read_tokens, prompt_tokens)

    def close(self) -> None:
        """End what is running, wait for it, free the memory. Safe to call twice."""
        self._worker.close()
        self.template.close()

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return self._worker.alive

    @property
    def waiting(self) -> int:
        """Answers that are not finished."""
        return self._worker.waiting

    @property
    def codec(self) -> TokenCodec:
        """Its tokenizer, for any thread. Raises BadParameter for a remote engine."""
        if self._codec is None:
            raise BadParameter("The tokens of the loaded model are not known here: it runs in another program. Send text.")
        return self._codec

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Text to ids. With `bos`, exactly one beginning-of-sequence token if the model uses one. Raises BadParameter."""
        return self.codec.encode(text, bos=bos)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Ids to text. With `special`, special tokens are part of it. Raises BadParameter."""
        return self.codec.decode(ids, special=special)

    def count(self, source: str | Sequence[Message]) -> int:
        """Tokens of a text or a conversation as the model reads it. Raises BadParameter."""
        return len(self.prompt(source).ids)

    def prompt(
        self,
        source: str | Sequence[Message],
        tools: ToolUse | None = None,
        *,
        template: ChatTemplate | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A plain text, or a conversation as its template shows it (`template`: another one): rendered once, tokenised once.

        `tools` are those that the answer may call, or has to: then the prompt ends where the call begins. `options` are
        more values for the template, by name: whether the model thinks.

        A conversation that ends in an assistant's message is continued. Earlier answers of this model that are
        unedited in it keep the ids they were sampled with. Raises BadParameter.
        """
        if isinstance(source, str):
            return Prompt(source, tuple(self._ids(source)))
        template = template or self.template
        shown = template.show(source, self.tokenizer, tools.tools if tools is not None else (), options)
        calls = tool_prompts.prompt_of(tools, template.tool_format, shown.has_skill) if tools is not None else None
        text = shown.text + (calls.opening if calls is not None else "")
        return Prompt(
            text, tuple(self._ids(text)), tuple(source), template.stop, calls, template.channels, template.thought_marks
        )

    def _ids(self, text: str) -> list[int]:
        """As `encode`, with the ids of earlier answers."""
        own: tuple[list[int], list[tuple[int, int]]] | None = None
        for ids, end in self._earlier.beginnings(text):
            if end == len(text):
                return ids
            if self.codec.splits(text, end):
                return ids + self.encode(text[end:], bos=False)
            if own is None and (own := self.codec.encode_with_offsets(text)) is None:
                break
            starts = [start for start, _end in own[1]]
            if end in starts:  # else a token of the text reaches over the end of the answer
                return ids + own[0][starts.index(end) :]
        return self.encode(text) if own is None else self.codec.with_bos(own[0])

    def generate(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Stream[Step | Finish]:
        """Ids in, Steps out, one Finish last. Joins the queue now; the computing follows in order. Raises BadParameter."""
        self.check(params)
        self._require_ids(ids, params)
        requested = time.perf_counter()

        def make() -> Iterator[Step | Finish | None]:
            return timed(self._steps(ids, params, cancel), requested)

        return self._worker.stream(make, cancel, cancelled(len(ids)), alone=self._is_alone(params))

    def score(self, ids: Sequence[int], top: int, cancel: threading.Event) -> Stream[Token | Finish]:
        """The log-probability of each id of a text after those before it, as Tokens without text; the first has none.

        `top`: how many of the likeliest come with each. One Finish last. Raises BadParameter.
        """
        self._require("logprobs" in self.can and not self.is_remote, "reports no log-probabilities")
        self._require_ids(ids)

        def make() -> Iterator[Token | Finish | None]:
            for event in self._scores(ids, top, cancel):
                yield Token(event.id, "", event.logprob, event.top) if isinstance(event, Step) else event

        return self._worker.stream(make, cancel, cancelled(len(ids)), alone=self._reads_alone())

    def embed(self, texts: Sequence[Sequence[int]], pooling: str, cancel: threading.Event) -> list[list[float]]:
        """Vectors of texts, given as ids: `pooling` mean or last. Waits for its turn. Raises BadParameter; Busy if cancelled."""
        self._require(self.can_embed, "gives out no hidden states")
        for each in texts:
            self._require_ids(each)

        def make() -> Iterator[list[float] | None]:
            for each in texts:
                yield (yield from self._vector(each, pooling, cancel))

        nothing: list[float] = []
        stream = self._worker.stream(make, cancel, nothing, alone=self._reads_alone())
        found = list(stream)
        if cancel.is_set():  # the last vector may be of a part of its text
            raise Busy("The model was unloaded before these texts were read. Send them again.")
        return found

    def _require(self, able: bool, words: str) -> None:
        if not able:
            raise BadParameter(f"The loader of {self.model.name} {words}. Load the model with the loader transformers.")

    def chat(self, messages: Sequence[Message], params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        """The next assistant message (or the rest of it): Tokens of settled text, one Finish last. Raises BadParameter."""
        return self.answer(self.prompt(messages), params, cancel)

    def complete(self, text: str, params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        """What follows a plain text, without a template. Raises BadParameter."""
        return self.answer(self.prompt(text), params, cancel)

    def answer(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        """What follows a prompt: Tokens of settled text, one Finish last. Raises BadParameter."""
        if prompt.calls is not None and prompt.calls.grammar is not None and "grammar" in self.can:
            params = replace(params, grammar=prompt.calls.grammar)
        self.check(params)
        self._require_ids(prompt.ids, params)
        requested = time.perf_counter()
        stop, strip = (*params.stop, *(each for each in prompt.stop if each not in params.stop)), prompt.begins_answer
        if params.grammar is not None:  # it says where the answer begins and ends
            stop, strip = params.stop, False
        inner = StopFlag(cancel)

        ids = list(prompt.ids)
        marked = prompt.calls.format if prompt.calls is not None else prompt.channels  # thoughts are told apart by their marks
        marks = prompt.thought_marks

        def answer() -> Iterator[Token | Finish | None]:
            steps = timed(self._steps_with(prompt, params, inner), requested)
            kept = self.codec.special_texts((*marks, *(marked.special if marked is not None else ())))
            events = settled(steps, Detokenizer(self.tokenizer, ids, kept), StopStrings(stop), inner)
            events = self._remembered(prompt, without_leading_space(events) if strip else events)
            if prompt.calls is None:
                return events
            reader = prompt.calls.reader(params.grammar is not None)
            return with_calls(events, CallsAfterThoughts(reader, prompt.text) if marks and params.grammar is None else reader)

        alone = bool(prompt.pictures) or self._is_alone(params)
        return self._worker.stream(answer, cancel, cancelled(len(prompt.ids)), alone=alone)

    def _remembered(self, prompt: Prompt, events: Iterator[Token | Finish | None]) -> Iterator[Token | Finish | None]:
        """Pass an answer on, and keep its ids for the prompts that will contain it."""
        ids: list[int] = []
        shown: list[str] = []
        try:
            for event in events:
                if isinstance(event, Token):
                    shown.append(event.text)
                    if event.id >= 0:
                        ids.append(event.id)
                elif isinstance(event, Finish) and ids and not prompt.pictures:
                    self._earlier.remember(prompt.text, prompt.ids, ids, "".join(shown), self.decode)
                yield event
        finally:
            if hasattr(events, "close"):
                events.close()


def _embedding_rows(model: LocalModel) -> int | None:
    """Of the token embeddings in a model's files; None where they do not tell."""
    try:
        rows = set(embedding_rows(tensors_of(model.weights)))
    except (GptqWebuiError, OSError):
        return None
    return rows.pop() if len(rows) == 1 else None
