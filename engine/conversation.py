"""A chat cut to the context: messages to prompt ids, rendered and tokenised once where it fits.

A chat that outgrows the context loses its oldest turns in blocks. A window that slid with every turn would begin
with other tokens each time, and nothing of the cached conversation could be reused; after a block is dropped, many
turns fit after the same beginning.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.chat import Message
from ..core.errors import PromptTooLong
from ..core.picture import without_pictures
from ..core.thinking import begun_by
from ..loaders.contract.base import LoadedModel
from ..loaders.contract.model_prompt import Prompt
from ..loaders.text import chat_template
from ..loaders.text.chat_template import ChatTemplate
from ..loaders.text.renderers import one_call

Prompter = Callable[[Sequence[Message]], Prompt]

_KEPT_SHARE = 0.7  # of the room for a prompt, that a chat is cut to once it does not fit
_WINDOWS = 256  # chats whose beginning is remembered
_MOST_CHARACTERS = 128  # of a token: a text of more than that times the context cannot fit


@dataclass(frozen=True)
class Window:
    """The part of a chat that a model reads."""

    prompt: Prompt
    dropped_turns: int = 0  # oldest messages that are left out, the system prompt not counted

    @property
    def begun(self) -> bool:
        """Whether the prompt ends inside of a thought, so that the answer begins with it."""
        return begun_by(self.prompt.text)


class Conversation:
    """Remembers where the windows of recent chats begin. For one model after another; any thread may ask."""

    def __init__(self) -> None:
        self._model: weakref.ref[LoadedModel] | None = None
        self._dropped: OrderedDict[bytes, int] = OrderedDict()  # digest of what was dropped -> about how many tokens it had
        self._templates: dict[str, tuple[weakref.ref[LoadedModel] | None, ChatTemplate | None]] = {}  # built-in, by name
        self._lock = threading.Lock()

    def window(
        self, loaded: LoadedModel, messages: Sequence[Message], max_new_tokens: int, *, remember: bool = True, template: str = ""
    ) -> Window:
        """The chat, or what fits of it: whole oldest turns go; the system prompt and the last turn stay.

        Room is kept for the answer, but for at most a quarter of the context. Raises PromptTooLong if the last message
        alone does not fit, BadParameter if the template cannot show the chat. With `remember` off, it is only a question.
        `template` is the name of a built-in one; "": that of the model.
        """
        if not loaded.sees_pictures:
            messages = without_pictures(messages)
        if loaded.is_remote:
            return Window(loaded.prompt(messages))
        with one_call():  # a template of strangers that is slow is not slow once for each prompt that is tried
            return self._window(loaded, messages, max_new_tokens, remember, self._prompter(loaded, template))

    def _window(
        self, loaded: LoadedModel, messages: Sequence[Message], max_new_tokens: int, remember: bool, show: Prompter
    ) -> Window:
        limit = loaded.context_tokens - max(1, min(max_new_tokens, loaded.context_tokens // 4))
        system = [each for each in messages[:1] if each.role == "system"]
        turns = list(messages[len(system) :])
        starts = sorted({0, *(at for at, each in enumerate(turns) if each.role == "user")})
        digests = _digests(system, turns)
        at, dropped_tokens = self._begin(loaded, [digests[start] for start in starts])
        if (first := _first_that_could_fit(turns, starts, loaded.context_tokens * _MOST_CHARACTERS)) > at:
            at, dropped_tokens = first, loaded.context_tokens
        prompt = show([*system, *turns[starts[at] :]])
        if at and len(prompt.ids) + dropped_tokens <= limit:  # later turns were deleted: the whole chat fits again
            at, dropped_tokens, prompt = 0, 0, show(messages)
        while len(prompt.ids) > limit and at < len(starts) - 1:
            at = _later_start(prompt, system, turns, starts, at, int(_KEPT_SHARE * limit))
            shorter = show([*system, *turns[starts[at] :]])
            dropped_tokens += len(prompt.ids) - len(shorter.ids)
            prompt = shorter
        if len(prompt.ids) >= loaded.context_tokens:
            raise _too_long(loaded, messages, len(prompt.ids))
        if at and remember:
            self._remember(digests[starts[at]], dropped_tokens)
        return Window(prompt, starts[at])

    def _prompter(self, loaded: LoadedModel, name: str) -> Prompter:
        """How messages become prompts. Raises BadParameter for a template that there is not."""
        if not name:
            return loaded.prompt
        with self._lock:
            of, template = self._templates.get(name, (None, None))
            if of is None or of() is not loaded:
                template = chat_template.named(name, "the conversation").bound(loaded.tokenizer)
                self._templates[name] = weakref.ref(loaded), template
        return lambda messages: loaded.prompt(messages, template=template)

    def _begin(self, loaded: LoadedModel, digests: Sequence[bytes]) -> tuple[int, int]:
        """(which of the possible beginnings an earlier window of this chat had, tokens dropped before it)."""
        with self._lock:
            if self._model is None or self._model() is not loaded:
                self._model = weakref.ref(loaded)
                self._dropped.clear()
            for at in reversed(range(1, len(digests))):
                if (tokens := self._dropped.get(digests[at])) is not None:
                    return at, tokens
        return 0, 0

    def _remember(self, digest: bytes, dropped_tokens: int) -> None:
        with self._lock:
            self._dropped[digest] = dropped_tokens
            self._dropped.move_to_end(digest)
            if len(self._dropped) > _WINDOWS:
                self._dropped.popitem(last=False)


def _first_that_could_fit(turns: Sequence[Message], starts: Sequence[int], characters: int) -> int:
    """The first beginning after which there are at most so many characters, else the last one."""
    left = sum(len(each.text) for each in turns)
    for at, (start, end) in enumerate(pairwise(starts)):
        if left <= characters:
            return at
        left -= sum(len(each.text) for each in turns[start:end])
    return len(starts) - 1


def _later_start(
    prompt: Prompt, system: Sequence[Message], turns: Sequence[Message], starts: Sequence[int], at: int, tokens: int
) -> int:
    """The first beginning after `starts[at]` with which at most about so many tokens are left, else the last one.

    Measured by characters, with the tokens and the template's own characters of the prompt that did not fit. The next
    prompt shows whether that was right.
    """
    shown = [*system, *turns[starts[at] :]]
    around = max(0.0, (len(prompt.text) - sum(len(each.text) for each in shown)) / len(shown))
    room = tokens * len(prompt.text) / len(prompt.ids) - sum(len(each.text) + around for each in system)
    for later in reversed(range(at + 1, len(starts))):
        end = starts[later + 1] if later + 1 < len(starts) else len(turns)
        room -= sum(len(each.text) + around for each in turns[starts[later] : end])
        if room < 0:
            return min(later + 1, len(starts) - 1)
    return at + 1


def _digests(system: Sequence[Message], turns: Sequence[Message]) -> list[bytes]:
    """One for every beginning: of the system prompt and the turns before it."""
    running = hashlib.sha256()
    found = []
    for at in range(-len(system), len(turns)):
        if at >= 0:
            found.append(running.digest())
        each = turns[at] if at >= 0 else system[0]
        running.update(f"{each.role} {len(each.text)} {each.text}".encode("utf-8", "surrogatepass"))
    return found or [running.digest()]


def _too_long(loaded: LoadedModel, messages: Sequence[Message], length: int) -> PromptTooLong:
    if messages[-1].role == "assistant":
        return PromptTooLong(
            f"This answer fills the context of {loaded.context_tokens} tokens; there is no room to continue it. "
            "Clear the chat, or load the model with a longer context."
        )
    return PromptTooLong(
        f"Your message has {length} tokens with the system prompt, the context {loaded.context_tokens}. "
        "Shorten it, or load the model with a longer context."
    )
