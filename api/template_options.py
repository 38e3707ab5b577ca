"""What a request says to the chat template: whether the model thinks, how hard, and values of the client's own.

Each program has another name for it. A value that the loaded model's template does not take is named once in the log.
"""

import json
import re
from typing import Any

from ..loaders.contract.base import LoadedModel
from .problems import Problem
from .service import Service

_MOST_CHARACTERS = 100_000
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_AS = {"": None, "auto": None, "default": None, "min": "minimal"}  # as SillyTavern and others have them
_SWITCHES = ("enable_thinking", "thinking", "reasoning")  # Qwen3 and GLM; DeepSeek V3.1 and Granite; Command A
_OURS = ("messages", "tools", "add_generation_prompt")  # what the request says elsewhere


def options_of(
    service: Service,
    loaded: LoadedModel,
    *,
    thinks: bool | None = None,
    effort: str | None = None,
    values: dict[str, Any] | None = None,
    field: str = "reasoning_effort",  # that `effort` comes from
) -> dict[str, Any]:
    """The values for the template, by name; `values` count before the others. Raises Problem."""
    found: dict[str, Any] = {}
    effort = _AS.get(effort, effort) if effort is not None else None
    if effort is not None and effort not in _EFFORTS:
        raise Problem("invalid", f"{field} must be one of {', '.join(_EFFORTS)}; found {effort[:40]!r}.", field)
    if effort == "none":
        thinks = False if thinks is None else thinks
    elif effort is not None:
        found["reasoning_effort"] = _of_channels(effort) if loaded.template.channels is not None else effort
    if thinks is not None:
        found |= dict.fromkeys(_SWITCHES, thinks)
    found |= {name: value for name, value in (values or {}).items() if name not in _OURS}
    if values and _length(found) > _MOST_CHARACTERS:
        text = f"chat_template_kwargs has more than {_MOST_CHARACTERS:,} characters. Send the text in the messages."
        raise Problem("invalid", text, "chat_template_kwargs")
    if not loaded.is_remote:
        service.ignore(f"{loaded.model.name}'s chat template", _not_taken(loaded, thinks, found))
    return found


def _length(values: dict[str, Any]) -> int:
    try:
        return len(json.dumps(values))
    except RecursionError:
        raise Problem("invalid", "chat_template_kwargs is nested too deep. Send flat values.", "chat_template_kwargs") from None


def _of_channels(effort: str) -> str:
    """GPT-OSS knows three."""
    return {"minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)


def _not_taken(loaded: LoadedModel, thinks: bool | None, found: dict[str, Any]) -> list[str]:
    jinja = loaded.template.jinja + loaded.template.tool_jinja
    missing = [name for name in found if name not in _SWITCHES and not re.search(rf"\b{re.escape(name)}\b", jinja)]
    if thinks is not None and not any(re.search(rf"\b{each}\b", jinja) for each in _SWITCHES):
        missing.append("enable_thinking")
    return missing
