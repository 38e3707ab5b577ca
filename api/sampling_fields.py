"""The sampling parameters as fields of a request, made from core/params.py: a new one there is a new one here."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..core.params import GenerationParams

_OWN_SHAPE = ("max_new_tokens", "stop", "seed", "logit_bias", "logprobs", "grammar")  # protocols spell these in their own ways


class Open(BaseModel):
    """A request that may hold fields we do not know; they are named once and ignored."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    def unknown(self) -> list[str]:
        return [name for name, value in (self.model_extra or {}).items() if value not in (None, False, 0, "", [], {})]


def _fields() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, limits, default in GenerationParams.limits():
        if name not in _OWN_SHAPE:
            kind = int if isinstance(default, int) else float
            low = -1 if name == "top_k" else limits.low  # vLLM's programs write "all" as -1
            made[name] = (kind | None, Field(None, ge=low, le=limits.high, description=limits.help))
    return made


Sampling: Any = create_model("Sampling", __base__=Open, **_fields())
NAMES = tuple(_fields())


def wishes(request: Any) -> dict[str, Any]:
    """What a request with the fields of `Sampling` says about sampling."""
    found = {name: getattr(request, name) for name in NAMES}
    return found | {"top_k": None if found["top_k"] == -1 else found["top_k"]}


def seed_of(value: int | None) -> int | None:
    """Any whole number as a seed of ours; a negative one draws anew."""
    return None if value is None or value < 0 else value % 2**31
