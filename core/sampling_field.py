"""One row of the table of sampling fields (core/params.py): its limits, its names, its check, and how others write it."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import BadParameter
from .grammar import Grammar

MOST_ENTRIES = 4096  # token ids in a list
MOST_TEXTS, LONGEST_TEXT = 512, 500  # in a list of texts that are compared with every token

Kind = Literal["number", "whole", "switch", "ids", "texts", "bias", "grammar"]
Group = Literal["everyday", "tails", "penalties", "dry", "shape", "ends", "bans", "form", "seed"]  # together on the page
BackEnd = Literal["own", "exllamav2", "remote", "fake"]  # "own": the samplers of this project (gptq/)
Protocol = Literal[
    "openai",  # besides the field's own name, which that protocol always takes
    "kobold",
    "lollms",
    "tgi",
    "host",  # the state of text-generation-webui
    "remote",  # sent to an engine elsewhere: OpenAI's own parameters
    "remote_extra",  # the same: what vLLM, SGLang, TGI and llama.cpp add to them
]


@dataclass(frozen=True)
class SamplingField:
    """One row of the table. `low` and `high` bound every accepted value; a slider ends there too."""

    label: str
    help: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    kind: Kind = "number"
    optional: bool = False  # may be None
    shown: bool = True  # in the Parameters tab
    group: Group = "tails"
    neutral: Any = None  # this value changes nothing; None: there is no such value
    zero_below: float = 0.0  # a smaller value is taken as 0
    least: float = 0.0  # a sampler computes with this where the value is lower
    unset: tuple[float, ...] = ()  # other programs write these and mean: not set
    in_kernel: bool = False  # a member of the GPU sampler's parameter structure, of the same name
    by_torch: bool = False  # the GPU's kernel cannot do it: an answer that sets it is sampled in PyTorch, alone
    in_requests: bool = False  # programs may send it under its own name
    back_ends: tuple[BackEnd, ...] = ()  # that obey it
    names: Mapping[Protocol, tuple[str, ...]] = field(default_factory=dict)  # in each protocol; the first that is set counts

    def check(self, name: str, value: Any) -> Any:
        """`value` as GenerationParams holds it. Raises BadParameter, which says what is wrong."""
        if value is None and self.optional:
            return None
        return _CHECKS[self.kind](self, name, value)

    def clamp(self, value: float) -> float:
        """The nearest value that is accepted."""
        return min(max(value, self.low), self.high)

    def read(self, value: Any) -> Any:
        """What another program's value means, as `check` takes it; None: not set, or not to be understood.

        A number past the limits becomes the nearest within: sliders of other programs go further than ours. Lists come as
        lists, or as the text that text-generation-webui sends: `1, 2` and `"\\n", ":"`.
        """
        if self.kind in ("number", "whole"):
            if not _is_number(value) or value in self.unset:
                return None
            return int(self.clamp(value)) if self.kind == "whole" else float(self.clamp(value))
        reader = _READERS.get(self.kind)
        return reader(value) if reader is not None else None


def row_of(default: Any, label: str, help: str, *limits: float, names: Mapping[Protocol, Any] | None = None, **rest: Any) -> Any:
    """`limits` are low, high and step; `names` are written as "one" or ("first", "second")."""
    all_names = {protocol: (each,) if isinstance(each, str) else tuple(each) for protocol, each in (names or {}).items()}
    bounds: dict[str, Any] = dict(zip(("low", "high", "step"), limits, strict=False))
    row = SamplingField(label, help, **bounds, names=all_names, **rest)
    return field(default=default, metadata={"row": row})


# --- the checks, one for each kind of value --------------------------------------------------------


def _brief(value: Any) -> str:
    """As Python writes it, cut short: a request may hold megabytes."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more than 4,300 digits, a deep list
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 100 else text[:99] + "…"


def _is_number(value: Any) -> bool:
    """True for an int of any size (JSON has no limit) and a finite float."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value))


def _check_number(row: SamplingField, name: str, value: Any) -> float:
    if not _is_number(value):
        raise BadParameter(f"{name} must be a number; found {_brief(value)}.", name)
    if row.kind == "whole" and value != int(value):
        raise BadParameter(f"{name} must be a whole number; found {_brief(value)}.", name)
    if not row.low <= value <= row.high:
        raise BadParameter(f"{name} must be between {row.low:g} and {row.high:g}; found {_brief(value)}.", name)
    if row.kind == "whole":
        return int(value)
    return 0.0 if 0 <= value < row.zero_below else float(value)


def _check_switch(_row: SamplingField, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadParameter(f"{name} must be true or false; found {_brief(value)}.", name)
    return value


def _check_ids(_row: SamplingField, name: str, value: Any) -> tuple[int, ...]:
    """Token ids, sorted, each once."""
    if not isinstance(value, (list, tuple)) or not all(_is_id(each) for each in value) or len(value) > MOST_ENTRIES:
        raise BadParameter(f"{name} must be a list of token ids, at most {MOST_ENTRIES:,}; found {_brief(value)}.", name)
    return tuple(sorted(set(value)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _check_texts(row: SamplingField, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) and each for each in value):
        raise BadParameter(f"{name} must be a list of texts, none of them empty; found {_brief(value)}.", name)
    if row.in_requests and (len(value) > MOST_TEXTS or any(len(each) > LONGEST_TEXT for each in value)):
        raise BadParameter(f"{name} may have {MOST_TEXTS} texts of up to {LONGEST_TEXT} characters; found {len(value)}.", name)
    return tuple(value)


def _check_bias(row: SamplingField, name: str, value: Any) -> tuple[tuple[int, float], ...]:
    """Pairs, or a mapping, of token id and bias -> pairs sorted by id."""
    try:
        pairs = sorted((int(id), float(bias)) for id, bias in (value.items() if isinstance(value, Mapping) else value))
    except (TypeError, ValueError):
        raise BadParameter(f"{name} must be pairs of token id and number; found {_brief(value)}.", name) from None
    for id, bias in pairs:
        if id < 0 or not row.low <= bias <= row.high:
            raise BadParameter(
                f"{name} must be pairs of token id and a number between {row.low:g} and {row.high:g}; found {id}: {bias:g}.",
                name,
            )
    return tuple(pairs)


def _check_grammar(_row: SamplingField, name: str, value: Any) -> Grammar:
    if not isinstance(value, Grammar):
        raise BadParameter(f"{name} must be a Grammar; found {_brief(value)}.", name)
    return value


_CHECKS: dict[str, Callable[[SamplingField, str, Any], Any]] = {
    "number": _check_number,
    "whole": _check_number,
    "switch": _check_switch,
    "ids": _check_ids,
    "texts": _check_texts,
    "bias": _check_bias,
    "grammar": _check_grammar,
}


# --- what other programs write ---------------------------------------------------------------------


def _read_switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _read_ids(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, str):
        value = [int(each) for each in value.split(",") if each.strip().isascii() and each.strip().isdigit()]
    if not isinstance(value, (list, tuple)):
        return None
    return tuple(each for each in value if _is_id(each))


def _read_texts(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text if text.startswith("[") else f"[{text}]")
        except (ValueError, RecursionError):
            value = [value]
    if not isinstance(value, (list, tuple)):
        return None
    return tuple(each for each in value if isinstance(each, str) and each)


_READERS: dict[str, Callable[[Any], Any]] = {"switch": _read_switch, "ids": _read_ids, "texts": _read_texts}
