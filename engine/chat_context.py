"""How much of the model's context a conversation takes, before anything is sent; and the prompt as the model gets it."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.chat import Message
from ..core.errors import PromptTooLong
from .engine import Engine


@dataclass(frozen=True)
class ContextUse:
    """In tokens. `used` is what the next prompt has, `limit` what it may have: the rest is kept for the answer."""

    used: int
    limit: int
    context: int
    left_out: int = 0  # oldest messages that the next prompt leaves out
    too_long: str = ""  # why the message cannot be sent

    @property
    def room(self) -> int:
        """Tokens until the oldest messages are left out."""
        return max(0, self.limit - self.used)

    @property
    def share(self) -> float:
        return min(1.0, self.used / max(1, self.context))


def context_use(engine: Engine, messages: Sequence[Message], max_new_tokens: int, template: str = "") -> ContextUse | None:
    """Of a conversation with what is typed at its end; None where nobody can say: no model, or one on another machine.

    Raises BadParameter if the template cannot show the conversation.
    """
    loaded = engine.loaded
    if loaded is None or loaded.is_remote:
        return None
    context = loaded.context_tokens
    limit = context - max(1, min(max_new_tokens, context // 4))
    if not messages:
        return ContextUse(0, limit, context)
    try:
        window = engine.conversation.window(loaded, messages, max_new_tokens, remember=False, template=template)
    except PromptTooLong as error:
        return ContextUse(context, limit, context, too_long=str(error))
    return ContextUse(len(window.prompt.ids), limit, context, window.dropped_turns)


def prompt_pieces(engine: Engine, messages: Sequence[Message], max_new_tokens: int, template: str = "") -> list[tuple[str, bool]]:
    """(text, whether it is a special token) of the prompt as the model gets it. Raises NotLoaded, PromptTooLong, BadParameter."""
    loaded = engine.ready()
    prompt = engine.conversation.window(loaded, messages, max_new_tokens, remember=False, template=template).prompt
    if loaded.is_remote or not prompt.ids:
        return [(prompt.text, False)]
    special = loaded.codec.special_ids
    pieces: list[tuple[str, bool]] = []
    plain: list[int] = []
    for id in (*prompt.ids, None):
        if id is not None and id not in special:
            plain.append(id)
            continue
        if plain:
            pieces.append((loaded.decode(plain, special=True), False))
            plain = []
        if id is not None:
            pieces.append((loaded.decode([id], special=True), True))
    return pieces
