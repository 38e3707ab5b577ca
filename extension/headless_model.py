"""A model without a transformers model, inside text-generation-webui: the host asks us for whole answers.

The host's own samplers and logits need a transformers model. While a loaded model of ours has none, and only then, the
hooks `custom_generate_reply` and `custom_tokenized_length` answer instead.
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
    """The value of the host's `shared.model`, which shows it that a model is loaded."""

    def __init__(self, loaded: LoadedModel) -> None:
        import torch

        self.name, self.is_divided = loaded.model.name, getattr(loaded, "ranks", 1) > 1
        self.device = torch.device("cpu")  # to which the host moves the ids of a prompt that it counts

    def __call__(self, *_: Any, **__: Any) -> Any:
        if self.is_divided:
            raise LoadFailed(
                f"{self.name} is computed by several GPUs together, which gives no logits. Set GPUs that compute together "
                "(tensor_parallel) to 1 for that, and press Reload."
            )
        raise LoadFailed(
            f"{self.name} is loaded with a loader that has no logits. Load it with the loader transformers for that."
        )

    generate = __call__


class RoughTokenizer:
    """Estimates token counts for a model whose tokenizer is elsewhere; enough to cut a prompt that is too long."""

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
    """A tokenizer with the `encode` and `decode` that the host calls."""
    return RoughTokenizer() if loaded.is_remote else loaded.tokenizer


def hooks(engine: Engine, stopped: Callable[[], bool]) -> dict[str, Callable[..., Any]]:
    """The host's hooks by name. `stopped` returns whether Stop was pressed in the host's page."""

    def custom_generate_reply(
        question: str, original_question: str, state: Mapping[str, Any], stopping_strings: Any = None, is_chat: bool = False
    ) -> Iterator[str]:
        """Yields the whole answer so far, each time it grows."""
        cancel = threading.Event()
        over = threading.Event()

        def watch() -> None:  # so that Stop works before the first token too
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
