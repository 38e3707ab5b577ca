"""How an answer is sampled. The one list of sampling parameters in this project.

The sliders, the HTTP validation and the saved settings are made from the fields below:
to add a parameter, add a field here and use it in the loaders.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import BadParameter
from .grammar import Grammar


@dataclass(frozen=True)
class Limits:
    """What a field may hold and how it is drawn. `low` and `high` bound every value that is
    accepted; a slider ends at `high`, so it is also where a sensible hand would stop."""

    label: str
    help: str
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    drawn: bool = True  # False: for programs, not on the page


def _field(
    default: Any, label: str, help: str, low: float = 0.0, high: float = 1.0, step: float = 0.01, *, drawn: bool = True
) -> Any:
    return field(default=default, metadata={"limits": Limits(label, help, low, high, step, drawn)})


@dataclass(frozen=True)
class GenerationParams:
    """Raises BadParameter, which names the field and its limits, for a value outside them."""

    max_new_tokens: int = _field(
        512, "Max new tokens", "The answer is cut after this many tokens (about ¾ of a word each).", 1, 32768, 1
    )
    temperature: float = _field(0.7, "Temperature", "0 always takes the likeliest token; higher is more varied.", 0.0, 5.0, 0.01)
    top_p: float = _field(
        0.95, "Top p", "Keep the likeliest tokens that together reach this probability; 1 keeps all.", 0.0, 1.0, 0.01
    )
    top_k: int = _field(40, "Top k", "Keep only this many of the likeliest tokens; 0 keeps all.", 0, 1000, 1)
    min_p: float = _field(
        0.0, "Min p", "Drop tokens less likely than this share of the likeliest one; 0 drops none.", 0.0, 1.0, 0.01
    )
    typical_p: float = _field(
        1.0, "Typical p", "Keep the tokens nearest to the expected surprise that reach this probability; 1 keeps all.", 0.0, 1.0
    )
    repetition_penalty: float = _field(
        1.1, "Repetition penalty", "Makes tokens that already occurred less likely; 1 changes nothing.", 0.5, 2.0, 0.01
    )
    presence_penalty: float = _field(
        0.0, "Presence penalty", "Taken once from every token that already occurred in the answer; 0 changes nothing.", -2.0, 2.0
    )
    frequency_penalty: float = _field(
        0.0, "Frequency penalty", "Taken from a token for each time it occurred in the answer; 0 changes nothing.", -2.0, 2.0
    )
    repetition_range: int = _field(
        0, "Penalty range", "The penalties look at this many last tokens; 0 looks at all.", 0, 32768, 1
    )
    seed: int | None = _field(
        None, "Seed", "The same seed gives the same answer; -1 or empty draws a new one each time.", -1, 2**31 - 1, 1
    )
    stop: tuple[str, ...] = _field((), "Stop strings", "The answer ends before the first of these; one a line.")
    logit_bias: tuple[tuple[int, float], ...] = _field(
        (), "Logit bias", "(token id, what is added to its logit) for some tokens.", -100.0, 100.0, drawn=False
    )
    logprobs: int | None = _field(
        None, "Log-probabilities", "Tell each token's, and those of this many likeliest.", 0, 20, 1, drawn=False
    )

    grammar: Grammar | None = _field(  # noqa: RUF009 (it is a field)
        None, "Grammar", "What the answer must be made of: JSON, a schema, a pattern.", drawn=False
    )

    def __post_init__(self) -> None:
        for name, limits, value in self.limits(self):
            if name == "stop":
                if isinstance(value, str) or not all(isinstance(each, str) and each for each in value):
                    raise BadParameter(f"stop must be a list of texts, none of them empty; found {value!r}.", name)
                object.__setattr__(self, "stop", tuple(value))
                continue
            if name == "logit_bias":
                object.__setattr__(self, name, _bias(value, limits))
                continue
            if name == "grammar":
                if value is not None and not isinstance(value, Grammar):
                    raise BadParameter(f"grammar must be a Grammar; found {value!r}.", name)
                continue
            if value is None and name in _OPTIONAL:
                continue
            whole = isinstance(getattr(type(self), name), int) or name in _OPTIONAL
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise BadParameter(f"{name} must be a number; found {value!r}.", name)
            if whole and value != int(value):
                raise BadParameter(f"{name} must be a whole number; found {value!r}.", name)
            if not limits.low <= value <= limits.high:
                raise BadParameter(f"{name} must be between {limits.low:g} and {limits.high:g}; found {value!r}.", name)
            object.__setattr__(self, name, int(value) if whole else float(value))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    @classmethod
    def limits(cls, values: "GenerationParams | None" = None) -> Iterator[tuple[str, Limits, Any]]:
        """(name, limits, value) of every parameter, in the order they are shown."""
        for each in fields(cls):
            yield each.name, each.metadata["limits"], getattr(values, each.name) if values is not None else each.default

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationParams":
        """From saved settings; keys of other versions are passed over."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


_OPTIONAL = ("seed", "logprobs")  # whole numbers that may be None


def _bias(value: Any, limits: Limits) -> tuple[tuple[int, float], ...]:
    """Pairs, or a mapping, of token id and bias, sorted by id. Raises BadParameter."""
    try:
        pairs = sorted((int(id), float(bias)) for id, bias in (value.items() if isinstance(value, Mapping) else value))
    except (TypeError, ValueError):
        raise BadParameter(f"logit_bias must be pairs of token id and number; found {value!r}.", "logit_bias") from None
    for id, bias in pairs:
        if id < 0 or not limits.low <= bias <= limits.high:
            raise BadParameter(
                f"logit_bias must be pairs of token id and a number between {limits.low:g} and {limits.high:g}; "
                f"found {id}: {bias:g}.",
                "logit_bias",
            )
    return tuple(pairs)


PRESETS: dict[str, GenerationParams] = {
    "Model card": GenerationParams(),  # what TheBloke's cards show: 0.7, 0.95, 40, 1.1, 512
    "Precise": GenerationParams(temperature=0.0, top_p=1.0, top_k=0),  # the penalty keeps long answers from looping
    "Balanced": GenerationParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.05),
    "Creative": GenerationParams(temperature=1.1, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.1),
}
