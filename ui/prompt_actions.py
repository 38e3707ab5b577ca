"""What a conversation's next prompt would be, how much of the context it takes, and what the model weighed in an answer."""

from collections.abc import Callable
from typing import Any

from ..core.chat import Message
from ..core.chat_record import NoSuchChat
from ..core.errors import GptqWebuiError
from ..core.params import GenerationParams
from ..engine.chat_context import context_use, prompt_pieces
from ..engine.chat_prompt import messages_of, own_params, with_files
from ..engine.likely_tokens import likely_tokens
from .chat_asked import Asked, files_in, number_in
from .chat_view import ChatView, order
from .context_meter import meter_html, prompt_html
from .job_watcher import Updates
from .likely_box import likely_html


class PromptActions:
    """Changes nothing of a conversation."""

    def __init__(self, view: ChatView, params: Callable[[Any], GenerationParams]) -> None:
        """`params`: as that of ChatActions."""
        self.parts, self.chats, self._params = view.parts, view.chats, params
        self.words: dict[str, Callable[..., Updates]] = {
            "prompt": self.prompt, "close-prompt": self.close_prompt, "likely": self.likely,
        }  # fmt: skip

    def prompt(self, asked: Asked) -> Updates:
        messages, params = self._prompt_of(asked, [])
        if not messages:
            return {self.parts.prompt: ""}
        pieces = prompt_pieces(self.chats.engine, messages, params.max_new_tokens, self._template(asked))
        return {self.parts.prompt: prompt_html(pieces), self.parts.out: order(reveal=1)}

    def likely(self, asked: Asked, message: str) -> Updates:
        path = self.chats.store.path(asked.owner, asked.id)
        at = next((at for at, each in enumerate(path) if each.id == number_in(message) and each.role == "assistant"), None)
        if at is None:
            raise NoSuchChat
        tokens = likely_tokens(self.chats.engine, self.chats.store.get(asked.owner, asked.id), path[: at + 1])
        return {self.parts.prompt: likely_html(path[at].id, tokens), self.parts.out: order(reveal=1)}

    def close_prompt(self, asked: Asked) -> Updates:
        return {self.parts.prompt: ""}

    def meter(self, asked: Asked, given: str) -> str:
        """HTML: how much of the context the conversation takes."""
        try:
            messages, params = self._prompt_of(asked, files_in(given))
            use = context_use(self.chats.engine, messages, params.max_new_tokens, self._template(asked))
            return meter_html(use, bool(asked.id and self.chats.store.get(asked.owner, asked.id).parameters))
        except GptqWebuiError:
            return ""

    def _template(self, asked: Asked) -> str:
        """Of the conversation; "" for the model's."""
        return self.chats.store.get(asked.owner, asked.id).template if asked.id else str(asked.settings["template"])

    def _prompt_of(self, asked: Asked, files: list[tuple[str, str]]) -> tuple[list[Message], GenerationParams]:
        """What would be sent now."""
        params = self._params(asked.values)
        messages: list[Message] = []
        if asked.id:
            info = self.chats.store.get(asked.owner, asked.id)
            messages, params = messages_of(info, self.chats.store.path(asked.owner, asked.id)), own_params(info, params)
        elif asked.system.strip():
            messages = [Message("system", asked.system.strip())]
        if asked.text.strip() or files:
            details = {"files": [{"name": name, "text": text} for name, text in files]}
            messages.append(Message("user", with_files(asked.text.strip(), details)))
        elif messages and messages[-1].role == "system":
            messages = []
        return messages, params
