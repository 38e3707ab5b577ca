"""What a model reads before it answers: made once for a request, then counted, queued and answered as it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...core.chat import Message
from ..text.tool_formats import ToolFormat
from ..text.tool_prompts import ToolPrompt


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: tuple[int, ...] = ()  # empty for a remote engine, which makes its own
    messages: tuple[Message, ...] | None = None  # what the text was rendered from; None: a plain text
    stop: tuple[str, ...] = ()  # role markers of the template: text that ends the answer
    calls: ToolPrompt | None = None  # the tools that the answer may call
    channels: ToolFormat | None = None  # the marks that tell apart what the answer thinks and says
    thought_marks: tuple[str, ...] = ()  # of its template, around a thought
    options: Mapping[str, Any] | None = None  # for a remote engine: more values for its template
    pictures: Mapping[str, Any] = field(default_factory=dict, compare=False)  # tensors of its pictures, for the model's forward

    @property
    def begins_answer(self) -> bool:
        """Whether the answer starts a new message: white space before its first word belongs to the template."""
        return self.messages is not None and (not self.messages or self.messages[-1].role != "assistant")
