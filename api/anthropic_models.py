"""The requests of Anthropic's Messages API, with its field names, and what they mean in our terms."""

import json
from typing import Any, Literal

from pydantic import Field

from ..core.chat import Message
from ..core.tools import ToolCall, ToolUse
from . import pictures, tool_requests
from .problems import Problem
from .sampling_fields import Open

_UNREAD = ("thinking", "redacted_thinking")  # of earlier answers: no template shows them again
_OUR_IDS, _THEIR_IDS = "call_", "toolu_"


class Block(Open):
    type: str
    text: str | None = None
    id: str | None = Field(None, description="of a tool_use")
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = Field(None, description="of a tool_result")
    content: Any = None
    is_error: bool | None = None
    source: dict[str, Any] | None = Field(None, description="of a document: only a text is read")


class AnthropicMessage(Open):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Open):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = Field(None, description="a JSON schema")


class ToolChoice(Open):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputConfig(Open):
    format: dict[str, Any] | None = None
    effort: str | None = Field(None, description="low, medium, high, max: what the template makes of it")


class CountRequest(Open):
    model: str = ""
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = Field(
        None,
        description="of the type enabled or adaptive: thoughts come as blocks; disabled: the model is told not to think",
    )
    output_config: OutputConfig | None = Field(None, description="its `format`: a JSON schema for the answer")
    output_format: dict[str, Any] | None = Field(None, description="the same, as the protocol had it before")

    @property
    def thinks(self) -> bool | None:
        """What is said to the template; None: nothing."""
        return {"enabled": True, "disabled": False}.get(str((self.thinking or {}).get("type")))

    @property
    def effort(self) -> str | None:
        return self.output_config.effort if self.output_config is not None else None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = None
    metadata: dict[str, Any] | None = None

    @property
    def shows_thoughts(self) -> bool:
        wanted = self.thinking or {}
        return wanted.get("type") in ("enabled", "adaptive") and wanted.get("display") != "omitted"


def messages_of(body: CountRequest, sees: bool = False) -> list[Message]:
    """The conversation with its system prompt. Raises Problem for what the model cannot read. `sees`: it reads pictures."""
    found: list[Message] = []
    if body.system:
        system = body.system if isinstance(body.system, str) else _text(body.system, "system")
        found.append(Message("system", system))
    for at, each in enumerate(body.messages):
        found += _messages(each, f"messages.{at}.content", sees)
    return found


def _messages(body: AnthropicMessage, field: str, sees: bool) -> list[Message]:
    """A message; each result of a tool in it becomes a message of its own."""
    if isinstance(body.content, str):
        return [Message(body.role, body.content)]
    found: list[Message] = []
    texts: list[str] = []
    shown: list[str] = []
    calls: list[ToolCall] = []
    for at, block in enumerate(body.content):
        if block.type == "tool_use" and body.role == "assistant":
            calls.append(_call(block, f"{field}.{at}"))
        elif block.type == "tool_result" and body.role == "user":
            if texts or shown:
                found.append(Message("user", "\n".join(texts), pictures=tuple(shown)))
                texts, shown = [], []
            found.append(_result(block, f"{field}.{at}"))
        elif block.type == "image" and sees:
            shown.append(pictures.of_source(block.source, f"{field}.{at}"))
        elif block.type not in _UNREAD:
            texts.append(_text([block], f"{field}.{at}"))
    if texts or calls or shown or not found:
        found.append(Message(body.role, "\n".join(texts), tuple(calls), pictures=tuple(shown)))
    return found


def _call(block: Block, field: str) -> ToolCall:
    if not block.name or not block.id:
        raise Problem("invalid", f"{field} must have the id and the name of a call.", field)
    try:
        arguments = json.dumps(block.input or {}, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise Problem("invalid", f"{field}.input is not JSON, or too deep. Send a JSON object.", f"{field}.input") from None
    return ToolCall(block.name, arguments, _our_id(block.id))


def _result(block: Block, field: str) -> Message:
    if not block.tool_use_id:
        raise Problem("invalid", f"{field}.tool_use_id must be the id of the call that this is the result of.", field)
    content = block.content
    if content is None:
        text = ""
    elif isinstance(content, str):
        text = content
    elif isinstance(content, list) and all(isinstance(each, dict) and isinstance(each.get("type"), str) for each in content):
        text = _text([_block(each, f"{field}.content") for each in content], f"{field}.content")
    else:
        raise Problem("invalid", f"{field}.content must be a text or a list of blocks.", f"{field}.content")
    return Message("tool", f"Error: {text}" if block.is_error else text, tool_call_id=_our_id(block.tool_use_id))


def _block(found: dict[str, Any], field: str) -> Block:
    text, source = found.get("text"), found.get("source")
    if not isinstance(text, str | None) or not isinstance(source, dict | None):
        raise Problem("invalid", f"{field}: `text` must be a text.", field)
    return Block.model_validate({"type": found["type"], "text": text, "source": source})


def _text(blocks: list[Block], field: str) -> str:
    """Raises Problem for a block that is no text."""
    texts: list[str] = []
    for each in blocks:
        source = each.source or {}
        if each.type == "document" and source.get("type") == "text" and isinstance(source.get("data"), str):
            texts.append(source["data"])
        elif each.type != "text":
            raise Problem("unsupported", f"This model reads text only; found a block of type {each.type[:40]!r}.", field)
        elif each.text is None:
            raise Problem("invalid", f"{field}: a block of type text needs its `text`.", field)
        else:
            texts.append(each.text)
    return "\n".join(texts)


def tools_of(body: CountRequest) -> ToolUse | None:
    """Raises Problem."""
    tools = []
    for at, each in enumerate(body.tools or ()):
        if each.type not in (None, "custom"):
            text = f"tools.{at}: this server has no tools of its own; give an `input_schema`. Found the type {each.type[:40]!r}."
            raise Problem("unsupported", text, f"tools.{at}.type")
        tools.append(tool_requests.tool(each.name, each.description, each.input_schema, f"tools.{at}"))
    choice = body.tool_choice or ToolChoice(type="auto")
    if choice.type == "tool" and not choice.name:
        raise Problem("invalid", "tool_choice of the type tool needs the `name` of one.", "tool_choice.name")
    only = choice.name or "" if choice.type == "tool" else ""
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    found = tool_requests.use(tools, "tool_choice", must=choice.type in ("any", "tool"), only=only, parallel=parallel)
    return None if choice.type == "none" else found


def schema_of(body: CountRequest) -> tuple[Any, str]:
    """(the JSON schema that the answer has to fit, its field); None without one. Raises Problem."""
    for found, field in (
        (body.output_config.format if body.output_config else None, "output_config.format"),
        (body.output_format, "output_format"),
    ):
        if found is not None:
            if found.get("type") != "json_schema":
                raise Problem("invalid", f"{field}.type must be json_schema.", f"{field}.type")
            return found.get("schema"), f"{field}.schema"
    return None, "output_config"


def _our_id(id: str) -> str:
    return _OUR_IDS + id.removeprefix(_THEIR_IDS) if id.startswith(_THEIR_IDS) else id


def their_id(id: str) -> str:
    """A call's id as Anthropic writes it."""
    return _THEIR_IDS + id.removeprefix(_OUR_IDS)
