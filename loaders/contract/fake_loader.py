"""A loader without weights, for tests of everything above it.

It answers with the words of its options, at a steady rate, through the same worker, detokeniser and stop strings as
the real ones. Words are its tokens.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.chat import Finish, Step
from ...core.models import LocalModel
from ...core.params import GenerationParams, obeyed_by
from ..machine.memory_fit import Demand
from ..text.built_in_templates import CHATML
from ..text.chat_template import ChatTemplate
from .base import LoadedModel, Loader, LoadProgress, Refusal


@dataclass(frozen=True)
class FakeOptions:
    answer: str = "The capital of France is Paris."
    tokens_per_s: float = 0.0  # 0: as fast as it can
    context_tokens: int = 2048
    refuse: str = ""
    fail: str = ""  # raised by load, after half of the work
    load_s: float = 0.0


class FakeTokenizer:
    """One id per word with the space before it, or per special token."""

    bos_token_id = None
    eos_token_id = 0
    bos_token = ""
    eos_token = "</s>"
    chat_template = None
    all_special_ids = (0,)

    def __init__(self) -> None:
        self._words: list[str] = ["</s>"]
        self._ids: dict[str, int] = {"</s>": 0}

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        pieces: list[str] = []
        for character in text:
            if character in " \n" or not pieces:
                pieces.append(character)
            else:
                pieces[-1] += character
        return {"input_ids": [self._id(piece) for piece in pieces]}

    def __len__(self) -> int:
        return len(self._words)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return "".join(self._words[each] for each in ids if not (skip_special_tokens and each == 0))

    def _id(self, word: str) -> int:
        if word not in self._ids:
            self._ids[word] = len(self._words)
            self._words.append(word)
        return self._ids[word]


class FakeLoader(Loader):
    name: ClassVar[str] = "fake"
    options: ClassVar[type] = FakeOptions
    context_option: ClassVar[str] = "context_tokens"

    def refusal(self, model: LocalModel, options: FakeOptions) -> Refusal | None:
        return Refusal(options.refuse, "choose another model") if options.refuse else None

    def demand(self, model: LocalModel, options: FakeOptions, gpu: bool) -> Demand:
        return Demand(options.context_tokens, on_gpu=gpu)

    def needs_bytes(self, model: LocalModel, options: FakeOptions) -> int:
        return model.size_bytes

    def load(self, model: LocalModel, options: FakeOptions, progress: LoadProgress) -> "FakeModel":
        progress(0.5, "Pretending to read the weights")
        time.sleep(options.load_s)
        if options.fail:
            raise RuntimeError(options.fail)
        progress(1.0, "Ready")
        return FakeModel(model, options)


class FakeModel(LoadedModel):
    can = obeyed_by("fake")

    def __init__(self, model: LocalModel, options: FakeOptions) -> None:
        super().__init__(
            model,
            FakeTokenizer(),
            ChatTemplate(CHATML, "ChatML", "the fake loader", ("<|im_end|>", "<|im_start|>")),
            context_tokens=options.context_tokens,
            context_reason="as you set it",
        )
        self.embedding_rows = None  # the ids of its tokenizer are its own
        self._options = options
        self.computed_tokens = 0  # over all answers, read or not

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish]:
        room = min(params.max_new_tokens, self.context_tokens - len(ids))
        answer = self.tokenizer(self._options.answer)["input_ids"]
        for at, id in enumerate(answer[:room]):
            if cancel.is_set():
                yield Finish("cancelled", prompt_tokens=len(ids))
                return
            if self._options.tokens_per_s:
                time.sleep(1 / self._options.tokens_per_s)
            self.computed_tokens += 1
            yield Step(id)
            if at + 1 == room < len(answer):
                break
        cut = len(answer) > room
        yield Finish("cancelled" if cancel.is_set() else "length" if cut else "stop", prompt_tokens=len(ids))
