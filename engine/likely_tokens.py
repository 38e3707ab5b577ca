"""What else an answer could have been: each token of it with its probability, and the tokens that were likelier or nearly so.

Nothing is recorded while an answer is written: the loaded model reads the conversation once more when somebody asks. So it
works for old answers, for edited ones, and for those of another model, too.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.chat import Token
from ..core.chat_record import ChatInfo, StoredMessage
from ..core.errors import GptqWebuiError
from ..loaders.contract.base import LoadedModel
from .chat_prompt import messages_of
from .engine import Engine

TOP = 10  # likeliest tokens at each place
MOST = 1500  # tokens of an answer that are shown
_BEFORE = 6  # tokens that are decoded with one, so that it gets the characters that are its own


@dataclass(frozen=True)
class Likely:
    text: str
    share: float  # probability, 0..1, of the model's own distribution
    is_special: bool = False  # the end of the answer, for example


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer."""

    text: str
    share: float
    at: int | None  # where it begins in the answer's text, in characters; None where that is not known
    others: tuple[Likely, ...]  # likeliest first; the token itself may be one of them


def likely_tokens(engine: Engine, info: ChatInfo, path: Sequence[StoredMessage]) -> list[AnswerToken]:
    """The tokens of the last message of `path`, which is an answer. Waits for its turn.

    Raises NotLoaded, PromptTooLong, BadParameter, GptqWebuiError.
    """
    loaded = engine.ready()
    if "logprobs" not in loaded.can or loaded.is_remote:
        raise GptqWebuiError(
            f"The loader of {loaded.model.name} does not report probabilities. Load the model with the loader transformers."
        )
    answer = path[-1].text
    before = engine.conversation.window(loaded, messages_of(info, path[:-1]), 1, remember=False, template=info.template).prompt
    ids = list(loaded.prompt(before.text + answer).ids[: loaded.context_tokens])
    start = next((at for at, (one, other) in enumerate(zip(before.ids, ids, strict=False)) if one != other), len(before.ids))
    ids = ids[: start + MOST]
    scored = [each for each in engine.score(ids, TOP, threading.Event()) if isinstance(each, Token)]
    texts = _texts(loaded, ids, start)
    special = loaded.codec.special_ids
    found: list[AnswerToken] = []
    at: int | None = 0
    for each, text in zip(scored[start:], texts, strict=False):
        if at is not None and not answer.startswith(text, at):
            at = None  # a template or a tokenizer that changes the text
        others = tuple(Likely(loaded.decode([id], special=True), _share(value), id in special) for id, value in each.top)
        found.append(AnswerToken(text, _share(each.logprob), at, others))
        at = at + len(text) if at is not None else None
    return found


def _texts(loaded: LoadedModel, ids: Sequence[int], start: int) -> list[str]:
    """The characters of each id from a place on."""
    found = []
    for at in range(start, len(ids)):
        first = max(start, at - _BEFORE)
        before = loaded.decode(ids[first:at], special=True) if first < at else ""
        now = loaded.decode(ids[first : at + 1], special=True)
        found.append(now[len(before) :] if now.startswith(before) else loaded.decode([ids[at]], special=True))
    return found


def _share(logprob: float | None) -> float:
    return math.exp(min(0.0, logprob)) if logprob is not None else 1.0
