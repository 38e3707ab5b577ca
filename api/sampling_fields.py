"""The sampling parameters as fields of a request, made from the table in core/params.py: a new row there is a new field here."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model
from pydantic_core import core_schema

from ..core.params import GenerationParams, names_in, read_request
from ..core.sampling_field import Protocol, SamplingField
from .problems import Problem

_TYPES: dict[str, Any] = {
    "number": float,
    "whole": int,
    "switch": bool,
    "ids": list[int] | str,  # text-generation-webui sends lists as texts
    "texts": list[str] | str,
}
_TYPE_NAMES = {
    "number": "a number",
    "whole": "a whole number",
    "switch": "true or false",
    "ids": "a list of token ids",
    "texts": "a list of texts",
}
_LISTS = ("list", "tuple", "set", "frozenset")
_DYNAMIC: dict[str, Any] = {  # the ends of a dynamic temperature, as text-generation-webui and tabbyAPI name them
    "dynamic_temperature": (bool | None, None),
    **dict.fromkeys(("dynatemp_low", "dynatemp_high", "min_temp", "max_temp"), (float | None, None)),
}


def _until_the_first_mistake(schema: Any) -> Any:
    """The schema, in which a list ends at its first wrong item.

    A body of 4 MB can hold a million of them: to tell them all, pydantic takes a minute and 3 GB, and nobody else is
    answered meanwhile.
    """
    if isinstance(schema, dict):
        if schema.get("type") in _LISTS and "fail_fast" in core_schema.ListSchema.__annotations__:  # pydantic 2.8
            schema["fail_fast"] = True
        for each in schema.values():
            _until_the_first_mistake(each)
    elif isinstance(schema, (list, tuple)):
        for each in schema:
            _until_the_first_mistake(each)
    return schema


class Open(BaseModel):
    """A request that may have fields that are not known here; they are named once and ignored."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return _until_the_first_mistake(handler(source))

    def unknown(self) -> list[str]:
        return [name for name, value in (self.model_extra or {}).items() if value not in (None, False, 0, "", [], {})]


def _own_fields() -> dict[str, Any]:
    """Under our own names and within our own limits. What is no sampler's number (stop, seed …) each protocol spells itself."""
    made: dict[str, Any] = {}
    for name, row, _default in GenerationParams.table():
        if row.in_requests:
            low = min(row.low, *row.unset) if row.unset else row.low
            limits: dict[str, Any] = {"ge": low, "le": row.high} if row.kind in ("number", "whole") else {}
            made[name] = (_type(row) | None, Field(None, description=row.help, **limits))
    return made


def _named_fields(protocol: Protocol, checked: bool) -> dict[str, Any]:
    """Under a protocol's names. Values past our limits are accepted (`read_request`), but no share over 1 and none below 0."""
    made: dict[str, Any] = {}
    rows = {name: row for name, row, _default in GenerationParams.table()}
    for name, theirs in names_in(protocol).items():
        row = rows[name]
        numbers = row.kind in ("number", "whole")
        limits: dict[str, Any] = {"ge": min(row.low, 0), "le": 1 if row.high == 1 else None} if checked and numbers else {}
        for each in theirs:
            made[each] = (_type(row) | None, Field(None, description=row.help if each == name else name, **limits))
    return made


def _type(row: SamplingField) -> Any:
    return _TYPES[row.kind]


def fields_of(protocol: Protocol, checked: bool = True) -> Any:
    """A base class for the requests of a protocol: its sampling fields."""
    return create_model(f"{protocol.title()}Sampling", __base__=Open, **_named_fields(protocol, checked), **_DYNAMIC)


Sampling: Any = create_model("Sampling", __base__=Open, **_own_fields(), **_named_fields("openai", checked=False), **_DYNAMIC)
_OWN_NAMES = tuple(_own_fields())
_ROWS = {name: row for name, row, _default in GenerationParams.table()}


def read_sampling(request: Any) -> dict[str, Any]:
    """What a request with the fields of `Sampling` says about sampling; our own name counts before another."""
    found = {name: _ROWS[name].read(value) for name in _OWN_NAMES if (value := getattr(request, name)) is not None}
    return read_protocol_sampling("openai", request) | {name: value for name, value in found.items() if value is not None}


def read_protocol_sampling(protocol: Protocol, request: BaseModel) -> dict[str, Any]:
    """What a request with the fields of `fields_of` says about sampling, under our names and within our limits."""
    return read_request(protocol, {name: getattr(request, name) for name in request.model_fields_set})


def read_named(given: Mapping[str, Any], names: Mapping[str, str] | None = None, within: str = "") -> dict[str, Any]:
    """Sampling values under our names; a number past the limits becomes the nearest within, None means not set.

    `names`: our name -> that of the request, for those that differ. Raises Problem for a value of another type, about the
    field `within` + its name.
    """
    found: dict[str, Any] = {}
    for name, row in _ROWS.items():
        theirs = (names or {}).get(name, name)
        value = given.get(theirs) if row.in_requests else None
        if value is None:
            continue
        if (read := row.read(value)) is not None:
            found[name] = read
        elif isinstance(value, bool) or value not in row.unset:
            raise Problem("invalid", f"{within}{theirs} must be {_TYPE_NAMES[row.kind]}.", within + theirs)
    return found


def seed_of(value: int | None) -> int | None:
    """Any whole number as a seed of ours; a negative one asks for a new one."""
    return None if value is None or value < 0 else value % 2**31
