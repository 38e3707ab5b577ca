"""A chat as the browser keeps it, and as it is shown."""

import json
import re
from dataclasses import dataclass, replace

from ..core.chat import Message

_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`)", re.DOTALL)


@dataclass(frozen=True)
class Transcript:
    """Messages of user and assistant, and the system prompt beside them."""

    messages: tuple[Message, ...] = ()
    system: str = ""

    @classmethod
    def read(cls, kept: str) -> "Transcript":
        """From what the browser kept; whatever is not a chat is an empty one."""
        try:
            values = json.loads(kept)
            messages = tuple(Message(each["role"], each["text"]) for each in values["messages"])
            if all(each.role in ("user", "assistant") and isinstance(each.text, str) for each in messages):
                return cls(messages, str(values["system"]))
        except (ValueError, TypeError, KeyError):
            pass
        return cls()

    def kept(self) -> str:
        messages = [{"role": each.role, "text": each.text} for each in self.messages]
        return json.dumps({"messages": messages, "system": self.system}, ensure_ascii=False)

    def prompt(self) -> list[Message]:
        """What the engine is given."""
        system = [Message("system", self.system.strip())] if self.system.strip() else []
        return [*system, *self.messages]

    def asked(self, text: str) -> "Transcript":
        return replace(self, messages=(*self.messages, Message("user", text)))

    def answered(self, text: str) -> "Transcript":
        """With `text` as the last answer, in place of the one that stands there; without one if it is empty."""
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
        return [replace(each, text=without_html(each.text)) for each in self.messages[first:]]


def without_html(markdown: str) -> str:
    """The same Markdown with tags shown as they were written: they must not run, and `<stdio.h>` must not vanish."""
    parts = _CODE.split(markdown)  # code at the odd places, where Markdown escapes by itself
    return "".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))
