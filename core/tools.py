"""Tools: functions of a client that a model may ask for, and its calls of them.

Only the nouns. How a model is shown its tools and how its calls are read is in loaders/text/ (tool_prompts.py, tool_formats.py).
"""

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

_ID_BYTES = 12


def new_call_id() -> str:
    return "call_" + secrets.token_hex(_ID_BYTES)


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str = ""
    parameters: str = ""  # the JSON schema of its arguments, as JSON; "": it takes none

    @property
    def schema(self) -> dict[str, Any]:
        """Of its arguments; a tool that names none takes an empty object."""
        found = json.loads(self.parameters) if self.parameters else None
        return found if isinstance(found, dict) and found else {"type": "object", "properties": {}}

    def described(self) -> dict[str, Any]:
        """As chat templates are given it: in OpenAI's shape."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """One call, complete."""

    name: str
    arguments: str  # JSON, an object
    id: str = field(default_factory=new_call_id)


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools."""

    tools: tuple[Tool, ...]
    must: bool = False  # the answer has to be a call (OpenAI: required)
    only: str = ""  # the one tool that has to be called
    parallel: bool | None = None  # whether one answer may hold several calls; None: nothing was said

    @property
    def is_forced(self) -> bool:
        return self.must or bool(self.only)

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that the answer may call."""
        return tuple(each for each in self.tools if not self.only or each.name == self.only)


@dataclass(frozen=True)
class CallPart:
    """A piece of a call on its way. The first of a call has its id and name; the arguments follow in pieces."""

    index: int  # of the call in its answer
    id: str = ""
    name: str = ""
    arguments: str = ""
