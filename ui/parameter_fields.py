"""The fields of the Parameters tab: one for each row of the table of sampling parameters.

A field shows a number, a text or a switch. A wrong value never takes the others with it: it becomes a sentence, and the
answers use the nearest value that is allowed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..core.errors import BadParameter
from ..core.grammar import Grammar
from ..core.params import GenerationParams, SamplingField
from ..core.sampling_field import Group
from ..loaders.text.bias_words import ids_of, read_lines
from ..loaders.text.token_codec import TokenCodec
from . import gradio_compat

GROUPS: dict[Group, str] = {
    "everyday": "",
    "tails": "Tails: unlikely tokens",
    "penalties": "Penalties for repeated tokens",
    "dry": "DRY: repeated sequences",
    "shape": "XTC, dynamic temperature, smoothing, mirostat",
    "ends": "Where an answer ends",
    "bans": "Bans and biases",
    "form": "Form of the answer",
    "seed": "Reproducibility",
}
_WIDEST_SLIDER_STEPS = 2000  # a hand cannot hit a value on a finer slider
_LONGEST_TEXT = 200_000  # characters of one field
_HELP = {
    "logit_bias": "One word a line with what is added to the logits of its tokens (sorry: -5), or a token's id (#123: 2).",
    "custom_token_bans": "Ids of tokens that are never sampled, with commas between them.",
    "stop_token_ids": "Ids of tokens that end the answer besides the model's own, with commas between them.",
    "bad_words": "Words whose last token may not follow the others; one a line.",
    "banned_strings": "Texts that do not occur: an answer goes back to where one began; one a line.",
    "dry_sequence_breakers": "Texts that a repetition does not reach over; one a line, \\n for a new line.",
    "grammar": "Empty: free text. Else json, a JSON schema, llama.cpp's rules (root ::= …), or a regular expression.",
}
_ESCAPED = ("dry_sequence_breakers",)  # a new line is written as \n there


@dataclass(frozen=True)
class Reading:
    """What the fields say."""

    params: GenerationParams
    problems: Mapping[str, str]  # name of a parameter -> a sentence about its value


def rows(params: GenerationParams | None = None) -> Iterator[tuple[str, SamplingField, Any]]:
    """(name, row, value) of every field, in the order of the values."""
    return (each for each in GenerationParams.table(params) if each[1].shown)


NAMES = tuple(name for name, _row, _default in rows())


def draw(name: str, row: SamplingField, value: Any) -> gr.components.Component:
    common: dict[str, Any] = {
        "label": row.label,
        "info": info(name, row),
        "elem_id": f"gw-{name}",
        "elem_classes": "gw-field",
        "min_width": 260,
    }
    shown = shown_value(name, row, value)
    if row.kind == "switch":
        return gr.Checkbox(shown, **common)
    if row.kind not in ("number", "whole"):
        return gr.Textbox(shown, lines=1 if row.kind == "ids" else 2, max_lines=8, **common)
    if _is_slider(row):
        return gradio_compat.Slider(row.low, row.high, value=shown, step=row.step, **common)
    return gradio_compat.Number(shown, precision=0, **common)


def info(name: str, row: SamplingField) -> str:
    """What a field is for, and the limits of a slider that does not show them."""
    help = _HELP.get(name, row.help)
    return f"{help} {row.low:g} to {row.high:g}." if _is_slider(row) and not gradio_compat.SLIDERS_SHOW_LIMITS else help


def _is_slider(row: SamplingField) -> bool:
    return row.kind in ("number", "whole") and (row.high - row.low) / row.step <= _WIDEST_SLIDER_STEPS


def shown_value(name: str, row: SamplingField, value: Any) -> Any:
    """What a field shows for a value of GenerationParams."""
    if row.kind == "texts":
        return "\n".join(_escape(each) if name in _ESCAPED else each for each in value)
    if row.kind == "ids":
        return ", ".join(str(each) for each in value)
    if row.kind == "bias":
        return "\n".join(f"#{id}: {bias:g}" for id, bias in value)
    if row.kind == "grammar":
        return "" if value is None else value.text or value.kind
    return -1 if value is None else value


def to_values(params: GenerationParams) -> list[Any]:
    """What the fields show for these parameters."""
    return [shown_value(name, row, value) for name, row, value in rows(params)]


def read(values: Sequence[Any], codec: Callable[[], TokenCodec | None] = lambda: None) -> Reading:
    """The values of the fields, in order. `codec`: the tokens of the loaded model, None where they are not known."""
    given: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for (name, row, default), value in zip(rows(), values, strict=True):
        try:
            given[name] = _read(name, row, value, codec)
        except BadParameter as error:
            problems[name] = str(error)
            usable = _nearest(row, value)
            given[name] = default if usable is None else usable
            if row.kind in ("number", "whole"):
                problems[name] += f" Answers use {-1 if given[name] is None else given[name]:g} until you change it."
            else:
                problems[name] += " Until you change it, it has no effect."
    return Reading(GenerationParams.from_dict(given), problems)


def to_params(values: Sequence[Any]) -> GenerationParams:
    """As `read`, but raises BadParameter for the first wrong value."""
    found = read(values)
    for name, sentence in found.problems.items():
        raise BadParameter(sentence, name)
    return found.params


def _read(name: str, row: SamplingField, value: Any, codec: Callable[[], TokenCodec | None]) -> Any:
    if row.kind in ("number", "whole"):
        if value is None and not row.optional:
            raise BadParameter(f"{row.label} is empty. Type a number from {row.low:g} to {row.high:g}.", name)
        return row.check(row.label, value)
    if row.kind == "switch":
        return row.check(row.label, bool(value))
    text = str(value or "")
    if len(text) > _LONGEST_TEXT:
        raise BadParameter(f"{row.label} may have {_LONGEST_TEXT:,} characters; found {len(text):,}. Shorten it.", name)
    if row.kind == "ids":
        return row.check(row.label, _ids(row, text))
    if row.kind == "bias":
        return row.check(row.label, _bias(row, text, codec))
    if row.kind == "grammar":
        return _grammar(text.strip())
    lines = [line for line in text.splitlines() if line]
    return row.check(row.label, [_unescape(line) if name in _ESCAPED else line for line in lines])


def _ids(row: SamplingField, text: str) -> list[int]:
    pieces = [each for each in text.replace("\n", ",").split(",") if each.strip()]
    for piece in pieces:
        if not (piece.strip().isascii() and piece.strip().isdigit() and len(piece.strip()) < 10):
            raise BadParameter(f"{row.label} must be ids with commas between them, such as 5, 271; found {piece.strip()[:40]!r}.")
    return [int(each) for each in pieces]


def _bias(row: SamplingField, text: str, codec: Callable[[], TokenCodec | None]) -> tuple[tuple[int, float], ...]:
    words = read_lines(text, row.low, row.high)
    if all(each.id is not None for each in words):
        return tuple((each.id, each.bias) for each in words if each.id is not None)
    known = codec()
    return ids_of(words, known) if known is not None else ()


def _grammar(text: str) -> Grammar | None:
    if not text:
        return None
    if text.lower() == "json":
        return Grammar("json")
    if text.startswith("{"):
        return Grammar("json_schema", text)
    return Grammar("gbnf" if "::=" in text else "regex", text)


def _nearest(row: SamplingField, value: Any) -> Any:
    """The nearest number that is allowed; None where there is none."""
    if row.kind not in ("number", "whole") or isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    nearest = row.clamp(value)
    return round(nearest) if row.kind == "whole" else float(nearest)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescape(text: str) -> str:
    return text.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t").replace("\0", "\\")
