"""How an answer is sampled: the one table of sampling fields.

Each row below is a `SamplingField` (core/sampling_field.py). From it come the checks, the sliders of the page, the fields
of the HTTP protocols under their own names, the parameter structure of the GPU sampler, what the GPU's kernel leaves to
PyTorch (`by_torch`), and what each back-end obeys. To add a parameter, add a row here and use it in the samplers
(gptq/sampling.py, gptq/cuda/sample.cu).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from .grammar import Grammar
from .sampling_field import BackEnd, Protocol, SamplingField, row_of


def _sampler(default: Any, label: str, help: str, *limits: float, **rest: Any) -> Any:
    """A number that the samplers compute with: in the structure of the kernel."""
    return row_of(default, label, help, *limits, in_kernel=True, in_requests=True, **rest)


def _request(default: Any, label: str, help: str, *limits: float, **rest: Any) -> Any:
    """What programs may send under its own name."""
    return row_of(default, label, help, *limits, in_requests=True, **rest)


def _torch(
    name: str, default: Any, label: str, help: str, *limits: float, also: Mapping[Protocol, Any] | None = None, **rest: Any
) -> Any:
    """Of a sampler that PyTorch computes. Most programs have one name for it; `also`: what others call it."""
    programs: tuple[Protocol, ...] = ("kobold", "host", "remote_extra")
    return _request(
        default, label, help, *limits, names=dict.fromkeys(programs, name) | dict(also or {}),
        neutral=rest.pop("neutral", default),
        **{"back_ends": ("own", "remote"), "group": "dry" if name.startswith("dry") else "shape", **rest},
    )  # fmt: skip


_TABLE: list[tuple[str, SamplingField, Any]] = []  # filled below, as soon as the class is made
_CHECKED: dict[str, Any] = {}  # the neutral values, checked
_NOTHING = object()
_EVERY: tuple[BackEnd, ...] = ("own", "exllamav2", "remote")


@dataclass(frozen=True)
class GenerationParams:
    """Raises BadParameter, which names the field and its limits, for a value outside them."""

    max_new_tokens: int = row_of(
        512, "Max new tokens", "The answer is cut after this many tokens (about ¾ of a word each).", 1, 32768, 1,
        kind="whole", group="everyday", back_ends=(*_EVERY, "fake"), names={"host": "max_new_tokens"},
    )  # fmt: skip
    temperature: float = _sampler(
        0.7, "Temperature", "0 always takes the likeliest token; higher is more varied.", 0.0, 5.0, 0.01,
        neutral=1.0, zero_below=1e-4,  # logits divided by less leave no room for the draw in fp32
        group="everyday", back_ends=_EVERY,
        names={"kobold": "temperature", "lollms": "temperature", "tgi": "temperature", "host": "temperature"},
    )  # fmt: skip
    top_p: float = _sampler(
        0.95, "Top p", "Keep the likeliest tokens that together reach this probability; 1 keeps all.", 0.0, 1.0, 0.01,
        neutral=1.0, least=1e-6, group="everyday", back_ends=_EVERY,
        names={"kobold": "top_p", "lollms": "top_p", "tgi": "top_p", "host": "top_p"},
    )  # fmt: skip
    top_k: int = _sampler(
        40, "Top k", "Keep only this many of the likeliest tokens; 0 keeps all.", 0, 1000, 1,
        kind="whole", neutral=0, unset=(-1,), group="everyday", back_ends=_EVERY,
        names={"kobold": "top_k", "lollms": "top_k", "tgi": "top_k", "host": "top_k", "remote_extra": "top_k"},
    )  # fmt: skip
    min_p: float = _sampler(
        0.0, "Min p", "Drop tokens less likely than this share of the likeliest one; 0 drops none.", 0.0, 1.0, 0.01,
        neutral=0.0, group="everyday", back_ends=_EVERY, names={"kobold": "min_p", "host": "min_p"},
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
        neutral=1.0, unset=(0,), group="everyday", back_ends=_EVERY,
        names={
            "kobold": ("rep_pen", "repetition_penalty"), "lollms": "repeat_penalty", "tgi": "repetition_penalty",
            "host": "repetition_penalty",
        },
    )  # fmt: skip
    presence_penalty: float = _sampler(
        0.0, "Presence penalty", "Taken once from every token that already occurred in the answer; 0 changes nothing.", -2.0, 2.0,
        neutral=0.0, group="penalties", back_ends=_EVERY,
        names={"kobold": "presence_penalty", "host": "presence_penalty", "remote": "presence_penalty"},
    )  # fmt: skip
    frequency_penalty: float = _sampler(
        0.0, "Frequency penalty", "Taken from a token for each time it occurred in the answer; 0 changes nothing.", -2.0, 2.0,
        neutral=0.0, group="penalties", back_ends=_EVERY,
        names={"tgi": "frequency_penalty", "host": "frequency_penalty", "remote": "frequency_penalty"},
    )  # fmt: skip
    repetition_range: int = _sampler(
        0, "Penalty range", "The penalties look at this many last tokens; 0 looks at all.", 0, 32768, 1,
        kind="whole", neutral=0, group="penalties", back_ends=("own", "exllamav2"),
        names={
            "openai": "repetition_penalty_range", "kobold": "rep_pen_range", "lollms": "repeat_last_n",
            "host": "repetition_penalty_range",
        },
    )  # fmt: skip
    seed: int | None = row_of(
        None, "Seed", "The same seed gives the same answer; -1 or empty takes a new one each time.", -1, 2**31 - 1, 1,
        kind="whole", optional=True, group="seed", back_ends=_EVERY, names={"host": "seed"},
    )  # fmt: skip
    stop: tuple[str, ...] = row_of(
        (),
        "Stop strings",
        "The answer ends before the first of these; one a line.",
        kind="texts",
        group="ends",
        back_ends=(*_EVERY, "fake"),
    )
    logit_bias: tuple[tuple[int, float], ...] = row_of(
        (), "Logit bias", "What is added to the logits of some tokens, by id.", -100.0, 100.0,
        kind="bias", group="bans", back_ends=_EVERY,
    )  # fmt: skip
    logprobs: int | None = row_of(
        None, "Log-probabilities", "Report each token's, and those of this many likeliest.", 0, 20, 1,
        kind="whole", optional=True, shown=False, back_ends=("own",),
    )  # fmt: skip
    min_tokens: int = _request(
        0, "Min tokens", "The answer does not end by itself before it has this many tokens.", 0, 32768, 1,
        kind="whole", neutral=0, by_torch=True, group="ends", back_ends=("own", "remote"),
        names={"openai": "min_length", "kobold": ("min_length", "min_tokens"), "remote_extra": "min_tokens"},
    )  # fmt: skip
    ignore_eos: bool = _request(
        False, "Ignore the end token", "The answer does not end by itself at all.", kind="switch", neutral=False,
        group="ends", back_ends=_EVERY,
        names={
            "openai": "ban_eos_token", "host": "ban_eos_token", "remote_extra": "ignore_eos",
            "kobold": ("use_default_badwordsids", "ban_eos_token", "ignore_eos"),  # KoboldCpp's name for it
        },
    )  # fmt: skip
    stop_token_ids: tuple[int, ...] = _request(
        (), "Stop tokens", "Ids that end the answer, besides the model's own.", kind="ids", neutral=(),
        group="ends", back_ends=_EVERY, names={"kobold": "stop_token_ids", "remote_extra": "stop_token_ids"},
    )  # fmt: skip
    custom_token_bans: tuple[int, ...] = _request(
        (), "Banned tokens", "Ids that are never sampled.", kind="ids", neutral=(),
        group="bans", back_ends=("own", "exllamav2"),
        names={"openai": "banned_tokens", "kobold": "custom_token_bans", "host": "custom_token_bans"},
    )  # fmt: skip
    bad_words: tuple[str, ...] = _request(
        (), "Banned words", "Words whose last token may not follow the others.", kind="texts", neutral=(), by_torch=True,
        group="bans", back_ends=("own", "remote"), names={"kobold": "bad_words", "remote_extra": "bad_words"},
    )  # fmt: skip
    banned_strings: tuple[str, ...] = _request(
        (), "Banned texts", "Texts that do not occur: an answer goes back to where one began.", kind="texts", neutral=(),
        by_torch=True, group="bans", back_ends=("own",),
        names={"kobold": ("banned_strings", "banned_tokens"), "host": "banned_strings"},
    )  # fmt: skip
    dry_multiplier: float = _torch(
        "dry_multiplier", 0.0, "DRY multiplier", "How much a token loses that would go on with a repetition; 0: nothing.",
        0.0, 10.0, 0.01, by_torch=True,
    )  # fmt: skip
    dry_base: float = _torch(
        "dry_base", 1.75, "DRY base", "The loss grows by this factor for each token of a repetition.", 1.0, 8.0, 0.01
    )
    dry_allowed_length: int = _torch(
        "dry_allowed_length", 2, "DRY allowed length", "Repetitions shorter than this many tokens lose nothing.", 1, 100, 1,
        kind="whole",
    )  # fmt: skip
    dry_penalty_last_n: int = _torch(
        "dry_penalty_last_n", 0, "DRY range", "DRY looks at this many last tokens; 0 looks at all.", 0, 32768, 1,
        kind="whole", unset=(-1,), also={"openai": "dry_range", "kobold": ("dry_penalty_last_n", "dry_range")},
    )  # fmt: skip
    dry_sequence_breakers: tuple[str, ...] = _torch(
        "dry_sequence_breakers", ("\n", ":", '"', "*"), "DRY sequence breakers", "Texts that a repetition does not reach over.",
        kind="texts",
    )  # fmt: skip
    xtc_probability: float = _torch(
        "xtc_probability", 0.0, "XTC probability", "How often the likeliest tokens are left out; 0 never.", 0.0, 1.0, 0.01,
        by_torch=True, back_ends=_EVERY,
    )  # fmt: skip
    xtc_threshold: float = _torch(
        "xtc_threshold",
        0.1,
        "XTC threshold",
        "Of the tokens that reach this probability, only the least likely stays.",
        0.0,
        1.0,
        back_ends=_EVERY,
    )
    dynatemp_range: float = _torch(
        "dynatemp_range", 0.0, "Dynamic temperature range", "The temperature follows the uncertainty, up to so much off.",
        0.0, 5.0, 0.01, by_torch=True,
    )  # fmt: skip
    dynatemp_exponent: float = _torch(
        "dynatemp_exponent", 1.0, "Dynamic temperature exponent", "How fast it rises with the uncertainty.", 0.01, 10.0, 0.01
    )
    smoothing_factor: float = _torch(
        "smoothing_factor", 0.0, "Smoothing factor", "Logits fall with their squared distance from the highest; 0: as they are.",
        0.0, 10.0, 0.01, by_torch=True,
    )  # fmt: skip
    smoothing_curve: float = _torch(
        "smoothing_curve", 1.0, "Smoothing curve", "Above 1, far logits fall faster.", 1.0, 10.0, 0.01
    )
    mirostat: int = _torch(
        "mirostat", 0, "Mirostat", "1 or 2: this version keeps the surprise at tau, in place of the other filters.", 0, 2, 1,
        kind="whole", by_torch=True, also={"openai": "mirostat_mode", "host": "mirostat_mode"},
    )  # fmt: skip
    mirostat_tau: float = _torch("mirostat_tau", 5.0, "Mirostat tau", "The surprise of a token, in bits.", 0.0, 20.0, 0.01)
    mirostat_eta: float = _torch("mirostat_eta", 0.1, "Mirostat eta", "How fast it is corrected.", 0.0, 1.0, 0.01)
    grammar: Grammar | None = row_of(  # noqa: RUF009 (it is a field)
        None, "Grammar", "What the answer must be made of: JSON, a schema, a pattern.",
        kind="grammar", optional=True, group="form", back_ends=("own", "remote"),
    )  # fmt: skip
    adapters: tuple[
        tuple[str, float], ...
    ] = ()  # LoRA adapters beside the model, by name, each with its weight; no row: not sampling

    def __post_init__(self) -> None:
        checked = _CHECKED  # every request makes several of these, where most values are as they were
        for name, row, value in self.table(self):
            if value is not checked.get(name, _NOTHING):
                object.__setattr__(self, name, row.check(name, value))
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    @classmethod
    def table(cls, values: "GenerationParams | None" = None) -> Iterator[tuple[str, SamplingField, Any]]:
        """(name, row, value) of every parameter, in the order they are shown; the default without `values`."""
        for name, row, default in _TABLE or [
            (each.name, each.metadata["row"], each.default) for each in fields(cls) if "row" in each.metadata
        ]:
            yield name, row, getattr(values, name) if values is not None else default

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationParams":
        """From saved settings; keys of other versions are passed over."""
        known = {name for name, _row, _default in cls.table()}
        return cls(**{name: value for name, value in values.items() if name in known})

    @property
    def in_one_pass(self) -> bool:
        """Whether the GPU's kernel does all of it. Otherwise PyTorch samples from its logits."""
        left = [name for name, row, value in self.table(self) if row.by_torch and value != row.neutral]
        return not left or (left == ["min_tokens"] and self.min_tokens >= self.max_new_tokens)  # end tokens are banned throughout


def obeyed_by(back_end: BackEnd) -> frozenset[str]:
    """Names of the parameters that a back-end obeys."""
    return frozenset(name for name, row, _default in GenerationParams.table() if back_end in row.back_ends)


def neutral_values() -> dict[str, Any]:
    """The values that change nothing: the model as it is."""
    return dict(_CHECKED)


@cache
def names_in(protocol: Protocol) -> Mapping[str, tuple[str, ...]]:
    """Name of a parameter -> its names in a protocol, for those that it has."""
    return {name: row.names[protocol] for name, row, _default in GenerationParams.table() if protocol in row.names}


def read_request(protocol: Protocol, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a request of another program says about the parameters, under our names.

    A number past the limits becomes the nearest within: sliders of other programs go further than ours.
    """
    found: dict[str, Any] = {}
    for name, names in names_in(protocol).items():
        for theirs in names:
            value = given.get(theirs)
            if name not in found and value is not None and (read := _ROWS[name].read(value)) is not None:
                found[name] = read
    return found | _dynamic_temperature(given)


def _dynamic_temperature(given: Mapping[str, Any]) -> dict[str, float]:
    """text-generation-webui and tabbyAPI name the two ends of a dynamic temperature."""
    if given.get("dynamic_temperature"):
        ends = given.get("dynatemp_low"), given.get("dynatemp_high")
    else:
        ends = given.get("min_temp"), given.get("max_temp")
    low, high = (_ROWS["temperature"].read(each) if each is not None else None for each in ends)
    if low is None or high is None or high <= low:
        return {}
    return {"temperature": (low + high) / 2, "dynatemp_range": (high - low) / 2}


def changed_in(protocol: Protocol, params: GenerationParams) -> dict[str, Any]:
    """Names in a protocol -> values, for the parameters that are not neutral."""
    return {
        theirs: value
        for name, row, value in GenerationParams.table(params)
        for theirs in row.names.get(protocol, ())
        if value != row.neutral
    }


_TABLE += GenerationParams.table()
_ROWS = {name: row for name, row, _default in _TABLE}
_CHECKED.update({name: row.check(name, row.neutral) for name, row in _ROWS.items() if row.neutral is not None})

PRESETS: dict[str, GenerationParams] = {
    "Model card": GenerationParams(),  # what TheBloke's model cards show: 0.7, 0.95, 40, 1.1, 512
    "Precise": GenerationParams(temperature=0.0, top_p=1.0, top_k=0),  # the penalty keeps long answers from looping
    "Balanced": GenerationParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.05),
    "Creative": GenerationParams(temperature=1.1, top_p=1.0, top_k=0, min_p=0.05, repetition_penalty=1.1),
}
