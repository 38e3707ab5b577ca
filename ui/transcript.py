"""A chat as the browser keeps it, and as the page shows it."""

import json
from dataclasses import dataclass, replace

from ..core.chat import Message
from .message_markdown import message_markdown
from .safe_markdown import safe_markdown

MOST_CHARACTERS = 2_000_000  # of a chat; browsers keep about 5 MB


@dataclass(frozen=True)
class Transcript:
    """The messages of user and assistant, and the system prompt."""

    messages: tuple[Message, ...] = ()
    system: str = ""

    @classmethod
    def read(cls, kept: str) -> "Transcript":
        """From the text that the browser kept. Anything that is not a chat becomes an empty one; the oldest messages of
        one that is too long are left out."""
        try:
            values = json.loads(kept)
            messages = [Message(each["role"], whole(each["text"])) for each in values["messages"]]
            system = whole(str(values["system"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls()
        if not all(each.role in ("user", "assistant") for each in messages):
            return cls()
        length = len(system)
        for at in range(len(messages) - 1, -1, -1):
            length += len(messages[at].text)
            if length > MOST_CHARACTERS:
                return cls(tuple(messages[at + 1 :]), system[:MOST_CHARACTERS])
        return cls(tuple(messages), system)

    def kept(self) -> str:
        messages = [{"role": each.role, "text": each.text} for each in self.messages]
        return json.dumps({"messages": messages, "system": self.system}, ensure_ascii=False)

    def prompt(self) -> list[Message]:
        """The messages for the engine."""
        system = [Message("system", self.system.strip())] if self.system.strip() else []
        return [*system, *self.messages]

    def asked(self, text: str) -> "Transcript":
        return replace(self, messages=(*self.messages, Message("user", whole(text))))

    def answered(self, text: str) -> "Transcript":
        """With `text` as the last answer, in place of the present one. An empty `text` removes it."""
        answer = (Message("assistant", text),) if text else ()
        return replace(self, messages=(*self.unanswered().messages, *answer))

    def unanswered(self) -> "Transcript":
        """Without the last answer."""
        last = self.messages[-1:]
        return replace(self, messages=self.messages[:-1]) if last and last[0].role == "assistant" else self

    @property
    def last_answer(self) -> str:
        """The answer at the end, "" if the user spoke last."""
        return self.messages[-1].text if self.messages and self.messages[-1].role == "assistant" else ""

    def shown(self, first: int = 0) -> list[Message]:
        """The messages from `first` on, ready for a Chatbot, which renders Markdown."""
        return [replace(each, text=_shown(each)) for each in self.messages[first:]]


def whole(text: str) -> str:
    """Text without halves of characters, which no encoding can write. Raises AttributeError for anything but a text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _shown(message: Message) -> str:
    return message_markdown(message.text) if message.role == "assistant" else safe_markdown(message.text)
