"""How an answer is sampled: the one table of sampling fields.

Each row below is a `SamplingField`. From it come the checks, the sliders of the page, the fields of the HTTP
protocols under their own names, the parameter structure of the GPU sampler, and what each back-end obeys.
To add a parameter, add a row here and use it in the samplers (gptq/sampling.py, gptq/cuda/sample.cu).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import BadParameter
from .grammar import Grammar

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
    kind: Literal["number", "whole", "texts", "bias", "grammar"] = "number"
    optional: bool = False  # may be None
    shown: bool = True  # on the page; False: for programs only
    neutral: Any = None  # this value changes nothing; None: there is no such value
    zero_below: float = 0.0  # a smaller value is taken as 0
    least: float = 0.0  # a sampler computes with this where the value is lower
    unset: tuple[float, ...] = ()  # other programs write these and mean: not set
    in_kernel: bool = False  # a member of the GPU sampler's parameter structure, of the same name
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


def _row(default: Any, label: str, help: str, *limits: float, names: Mapping[Protocol, Any] | None = None, **rest: Any) -> Any:
    """`limits` are low, high and step; `names` are written as "one" or ("first", "second")."""
    all_names = {protocol: (each,) if isinstance(each, str) else tuple(each) for protocol, each in (names or {}).items()}
    bounds: dict[str, Any] = dict(zip(("low", "high", "step"), limits, strict=False))
    row = SamplingField(label, help, **bounds, names=all_names, **rest)
    return field(default=default, metadata={"row": row})


def _sampler(default: Any, label: str, help: str, *limits: float, names: Mapping[Protocol, Any], **rest: Any) -> Any:
    """A number that the samplers compute with: in the structure of the kernel."""
    return _row(default, label, help, *limits, names=names, in_kernel=True, **rest)


_EVERY: tuple[BackEnd, ...] = ("own", "exllamav2", "remote")


@dataclass(frozen=True)
class GenerationParams:
    """Raises BadParameter, which names the field and its limits, for a value outside them."""

    max_new_tokens: int = _row(
        512, "Max new tokens", "The answer is cut after this many tokens (about ¾ of a word each).", 1, 32768, 1,
        kind="whole", back_ends=(*_EVERY, "fake"), names={"host": "max_new_tokens"},
    )  # fmt: skip
    temperature: float = _sampler(
        0.7, "Temperature", "0 always takes the likeliest token; higher is more varied.", 0.0, 5.0, 0.01,
        neutral=1.0, zero_below=1e-4,  # logits divided by less leave no room for the draw in fp32
        back_ends=_EVERY,
        names={"kobold": "temperature", "lollms": "temperature", "tgi": "temperature", "host": "temperature"},
    )  # fmt: skip
    top_p: float = _sampler(
        0.95, "Top p", "Keep the likeliest tokens that together reach this probability; 1 keeps all.", 0.0, 1.0, 0.01,
        neutral=1.0, least=1e-6, back_ends=_EVERY,
        names={"kobold": "top_p", "lollms": "top_p", "tgi": "top_p", "host": "top_p"},
    )  # fmt: skip
    top_k: int = _sampler(
        40, "Top k", "Keep only this many of the likeliest tokens; 0 keeps all.", 0, 1000, 1,
        kind="whole", neutral=0, unset=(-1,), back_ends=_EVERY,
        names={"kobold": "top_k", "lollms": "top_k", "tgi": "top_k", "host": "top_k", "remote_extra": "top_k"},
    )  # fmt: skip
    min_p: float = _sampler(
        0.0, "Min p", "Drop tokens less likely than this share of the likeliest one; 0 drops none.", 0.0, 1.0, 0.01,
        neutral=0.0, back_ends=_EVERY, names={"kobold": "min_p", "host": "min_p"},
    )  # fmt: skip
    top_n_sigma: float = _sampler(
        0.0, "Top n-sigma", "Drop tokens whose logit is more than this many standard deviations under the highest; 0 drops none.",
        0.0, 10.0, 0.01, neutral=0.0, unset=(-1,), back_ends=("own", "remote"),
        names={"kobold": "nsigma", "host": "top_n_sigma", "remote_extra": "top_n_sigma"},
    )  # fmt: skip
    typical_p: float = _sampler(
        1.0, "Typical p", "Keep the tokens nearest to the expected surprise that reach this probability; 1 keeps all.", 0.0, 1.0,
        neutral=1.0, least=1e-6, back_ends=_EVERY,
        names={"kobold": ("typical", "typical_p"), "tgi": "typical_p", "host": "typical_p", "remote_extra": "typical_p"},
    )  # fmt: skip
    repetition_penalty: float = _sampler(
        1.1, "Repetition penalty", "Makes tokens that already occurred less likely; 1 changes nothing.", 0.5, 2.0, 0.01,
        neutral=1.0, unset=(0,), back_ends=_EVERY,
        names={
            "kobold": ("rep_pen", "repetition_penalty"), "lollms": "repeat_penalty", "tgi": "repetition_penalty",
            "host": "repetition_penalty",
        },
    )  # fmt: skip
    presence_penalty: float = _sampler(
        0.0, "Presence penalty", "Taken once from every token that already occurred in the answer; 0 changes nothing.", -2.0, 2.0,
        neutral=0.0, back_ends=_EVERY,
        names={"kobold": "presence_penalty", "host": "presence_penalty", "remote": "presence_penalty"},
    )  # fmt: skip
    frequency_penalty: float = _sampler(
        0.0, "Frequency penalty", "Taken from a token for each time it occurred in the answer; 0 changes nothing.", -2.0, 2.0,
        neutral=0.0, back_ends=_EVERY,
        names={"tgi": "frequency_penalty", "host": "frequency_penalty", "remote": "frequency_penalty"},
    )  # fmt: skip
    repetition_range: int = _sampler(
        0, "Penalty range", "The penalties look at this many last tokens; 0 looks at all.", 0, 32768, 1,
        kind="whole", neutral=0, back_ends=("own", "exllamav2"),
        names={
            "openai": "repetition_penalty_range", "kobold": "rep_pen_range", "lollms": "repeat_last_n",
            "host": "repetition_penalty_range",
        },
    )  # fmt: skip
    seed: int | None = _row(
        None, "Seed", "The same seed gives the same answer; -1 or empty takes a new one each time.", -1, 2**31 - 1, 1,
        kind="whole", optional=True, back_ends=_EVERY, names={"host": "seed"},
    )  # fmt: skip
    stop: tuple[str, ...] = _row(
        (), "Stop strings", "The answer ends before the first of these; one a line.", kind="texts", back_ends=(*_EVERY, "fake")
    )
    logit_bias: tuple[tuple[int, float], ...] = _row(
        (), "Logit bias", "(token id, what is added to its logit) for some tokens.", -100.0, 100.0,
        kind="bias", shown=False, back_ends=_EVERY,
    )  # fmt: skip
    logprobs: int | None = _row(
        None, "Log-probabilities", "Report each token's, and those of this many likeliest.", 0, 20, 1,
        kind="whole", optional=True, shown=False, back_ends=("own",),
    )  # fmt: skip
    grammar: Grammar | None = _row(  # noqa: RUF009 (it is a field)
        None, "Grammar", "What the answer must be made of: JSON, a schema, a pattern.",
        kind="grammar", optional=True, shown=False, back_ends=("own", "remote"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, row, value in self.table(self):
            object.__setattr__(self, name, row.check(name, value))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    @classmethod
    def table(cls, values: "GenerationParams | None" = None) -> Iterator[tuple[str, SamplingField, Any]]:
        """(name, row, value) of every parameter, in the order they are shown; the default without `values`."""
        for each in fields(cls):
            yield each.name, each.metadata["row"], getattr(values, each.name) if values is not None else each.default

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationParams":
        """From saved settings; keys of other versions are passed over."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def obeyed_by(back_end: BackEnd) -> frozenset[str]:
    """Names of the parameters that a back-end obeys."""
    return frozenset(name for name, row, _default in GenerationParams.table() if back_end in row.back_ends)


def neutral_values() -> dict[str, Any]:
    """The values that change nothing: the model as it is."""
    return {name: row.neutral for name, row, _default in GenerationParams.table() if row.neutral is not None}


def names_in(protocol: Protocol) -> dict[str, tuple[str, ...]]:
    """Name of a parameter -> its names in a protocol, for those that it has."""
    return {name: row.names[protocol] for name, row, _default in GenerationParams.table() if protocol in row.names}


def read_request(protocol: Protocol, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a request of another program says about the parameters, under our names.

    A value past the limits becomes the nearest within: sliders of other programs go further than ours.
    """
    found: dict[str, Any] = {}
    for name, row, _default in GenerationParams.table():
        for theirs in row.names.get(protocol, ()):
            value = given.get(theirs)
            if name not in found and value is not None and _is_number(value) and value not in row.unset:
                found[name] = int(row.clamp(value)) if row.kind == "whole" else float(row.clamp(value))
    return found


def changed_in(protocol: Protocol, params: GenerationParams) -> dict[str, Any]:
    """Names in a protocol -> values, for the parameters that are not neutral."""
    return {
        theirs: value
        for name, row, value in GenerationParams.table(params)
        for theirs in row.names.get(protocol, ())
        if value != row.neutral
    }


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
    return 0.0 if value < row.zero_below else float(value)


def _check_texts(_row: SamplingField, name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) and each for each in value):
        raise BadParameter(f"{name} must be a list of texts, none of them empty; found {_brief(value)}.", name)
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
    "texts": _check_texts,
    "bias": _check_bias,
    "grammar": _check_grammar,
}


PRESETS: dict[str, GenerationParams] = {
    "Model card": GenerationParams(),  # what TheBloke's model cards show: 0.7, 0.95, 40, 1.1, 512
    "Precise": GenerationParams(temperature=0.0, top_p=1.0, top_k=0),  # the penalty keeps long answers from looping
    "Balanced": GenerationParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.05),
    "Creative": GenerationParams(temperature=1.1, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.1),
}
