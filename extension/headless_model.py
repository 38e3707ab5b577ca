"""A model that transformers cannot drive, as text-generation-webui sees it: it asks us for whole answers.

Its own samplers and logits need a transformers model. While one of ours without that face is loaded, the hooks
`custom_generate_reply` and `custom_tokenized_length` answer in their place, and only then.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..core.chat import Token
from ..core.errors import GptqWebuiError, LoadFailed
from ..core.params import GenerationParams, read_request
from ..engine.engine import Engine
from ..loaders.contract.base import LoadedModel

_PIECE = re.compile(r"\s?\w{1,5}|\s|[^\w\s]")  # about one token each


class HeadlessModel:
    """Stands in `shared.model`, so that the host knows that a model is loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        import torch

        self.name = loaded.model.name
        self.device = torch.device("cpu")  # where the host puts the ids of a prompt that it counts

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise LoadFailed(f"{self.name} is run by an engine that shows no logits. Load it with the loader transformers for that.")

    generate = __call__


class RoughTokenizer:
    """Counts the tokens of a model whose tokenizer is not here: good enough to cut a prompt that is too long."""

    bos_token_id = None
    eos_token_id = None

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text: str, return_tensors: str | None = None, **_: Any) -> Any:
        """Ids as a list, or as a LongTensor [1, n] with return_tensors="pt"."""
        ids = [self._id(piece) for piece in _PIECE.findall(text)]
        if return_tensors is None:
            return ids
        import torch

        return torch.tensor([ids], dtype=torch.long)

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(self._pieces[int(each)] for each in ids)

    def _id(self, piece: str) -> int:
        if piece not in self._ids:
            self._ids[piece] = len(self._pieces)
            self._pieces.append(piece)
        return self._ids[piece]


def tokenizer_for(loaded: LoadedModel) -> Any:
    """One with the `encode` and `decode` that the host calls."""
    return RoughTokenizer() if loaded.is_remote else loaded.tokenizer


def hooks(engine: Engine, stopped: Callable[[], bool]) -> dict[str, Callable[..., Any]]:
    """The host's hooks by name. `stopped` says whether its page's Stop was pressed."""

    def custom_generate_reply(
        question: str, original_question: str, state: Mapping[str, Any], stopping_strings: Any = None, is_chat: bool = False
    ) -> Iterator[str]:
        """The whole answer so far, again and again, as the host wants it."""
        cancel = threading.Event()
        over = threading.Event()

        def watch() -> None:  # Stop counts also while no token comes: in a queue, or before the first word
            while not over.wait(0.1):
                if stopped() or ((event := state.get("stop_event")) is not None and event.is_set()):
                    cancel.set()

        answer = engine.complete(question, to_params(state, stopping_strings), cancel)
        threading.Thread(target=watch, name="gptq-webui stop", daemon=True).start()
        text = ""
        try:
            for event in answer:
                if isinstance(event, Token) and event.text:
                    text += event.text
                    yield text
        finally:
            over.set()
            answer.close()

    def custom_tokenized_length(prompt: str) -> int:
        loaded = engine.loaded
        if loaded is not None and not loaded.is_remote:
            try:
                return len(loaded.encode(prompt))
            except GptqWebuiError:
                pass
        return len(_PIECE.findall(prompt))

    return {"custom_generate_reply": custom_generate_reply, "custom_tokenized_length": custom_tokenized_length}


def to_params(state: Mapping[str, Any], stopping_strings: Any) -> GenerationParams:
    """The host's state as our parameters; what is outside of our limits is brought to the nearest that is not."""
    values = read_request("host", state)
    if state.get("auto_max_new_tokens"):
        rows = {name: row for name, row, _default in GenerationParams.table()}
        values["max_new_tokens"] = int(rows["max_new_tokens"].high)  # the engine ends where the context does
    if state.get("do_sample") is False:
        values["temperature"] = 0.0
    stop = stopping_strings if isinstance(stopping_strings, list) else []
    return GenerationParams(**values, stop=tuple(each for each in stop if isinstance(each, str) and each))
