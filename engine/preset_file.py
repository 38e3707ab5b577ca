"""Presets in the form in which text-generation-webui keeps and shares them: YAML with its own names of parameters.

Such a file lists only what differs from the values that change nothing. It holds samplers alone: no length, no seed, no
stop strings. Also here: a model's generation_config.json as a preset.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import GptqWebuiError
from ..core.folder_files import printable, read_json
from ..core.params import GenerationParams, names_in, neutral_values, read_request
from .plain_yaml import NotPlainYaml, YamlReferences, plain_yaml

LONGEST_FILE = 100_000  # characters
SAMPLERS = tuple(
    name
    for name, row, _default in GenerationParams.table()
    if row.shown and row.group in ("everyday", "tails", "penalties", "dry", "shape") and name != "max_new_tokens"
)
_THEIR_RANGE = 1024  # their default where a preset does not say over how many tokens the penalties reach
_WITHOUT_EFFECT = {"temperature_last", "sampler_priority", "dynamic_temperature", "dynatemp_low", "dynatemp_high", "do_sample"}
_NEUTRAL_THERE = {  # samplers that we do not have, and where they change nothing
    "tfs": 1, "top_a": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1, "penalty_alpha": 0,
    "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "num_beams": 1,
}  # fmt: skip


class BadPresetFile(GptqWebuiError):
    """Not a preset; its text says what was found."""


@dataclass(frozen=True)
class ReadPreset:
    values: dict[str, Any]  # of GenerationParams
    ignored: tuple[str, ...] = ()  # their names of what would change something and is not done here


def to_yaml(params: GenerationParams) -> str:
    """The text of a preset file."""
    import yaml

    theirs = {name: names[0] for name, names in names_in("host").items() if name in SAMPLERS}
    written: dict[str, Any] = {}
    for name, row, value in GenerationParams.table(params):
        if name in theirs and value != row.neutral:
            written[theirs[name]] = ", ".join(_quoted(each) for each in value) if row.kind == "texts" else value
    usual = GenerationParams()
    for name, neighbour in (("dry_sequence_breakers", "dry_multiplier"), ("xtc_threshold", "xtc_probability")):
        if getattr(params, name) == getattr(usual, name) or not getattr(params, neighbour):
            written.pop(theirs.get(name, ""), None)
    if params.temperature == 0:
        written.pop("temperature", None)
        written["do_sample"] = False
    if params.dynatemp_range and params.temperature:
        written.pop("temperature", None)
        low, high = params.temperature - params.dynatemp_range, params.temperature + params.dynatemp_range
        written |= {"dynamic_temperature": True, "dynatemp_low": round(max(low, 0.0), 4), "dynatemp_high": round(high, 4)}
    written.pop("dynatemp_range", None)
    written.setdefault("repetition_penalty_range", params.repetition_range)
    if written["repetition_penalty_range"] == _THEIR_RANGE:
        del written["repetition_penalty_range"]
    return str(yaml.safe_dump(written, sort_keys=False, allow_unicode=True))


def _quoted(text: str) -> str:
    import json

    return json.dumps(text, ensure_ascii=False)


def from_yaml(text: str) -> ReadPreset:
    """What a preset file says, with the values that change nothing where it says nothing. Raises BadPresetFile."""
    if len(text) > LONGEST_FILE:
        raise BadPresetFile(f"A preset has at most {LONGEST_FILE:,} characters; found {len(text):,}. Choose another file.")
    try:
        found = plain_yaml(text)
    except YamlReferences:
        raise BadPresetFile("A preset has no references (& and *). Choose another file.") from None
    except NotPlainYaml:
        raise BadPresetFile("This is not YAML. Write lines such as `temperature: 0.7`.") from None
    if not isinstance(found, dict) or not found:
        kind = "nothing" if found is None or found == {} else "a list" if isinstance(found, list) else "plain text"
        raise BadPresetFile(f"Found {kind} in place of names and values. Write lines such as `temperature: 0.7`.")
    given = {printable(str(name)): value for name, value in found.items()}
    known = {each for names in names_in("host").values() for each in names} | _WITHOUT_EFFECT | set(_NEUTRAL_THERE)
    if not known & set(given):
        names = ", ".join(list(given)[:5])
        raise BadPresetFile(
            f"None of its names is a sampling parameter of text-generation-webui (found: {names[:200]}). Choose another file."
        )
    values = _samplers({"repetition_penalty_range": _THEIR_RANGE} | given, "host")
    ignored = [name for name, usual in _NEUTRAL_THERE.items() if name in given and given[name] != usual]
    ignored += [name for name in given if name not in known and name not in GenerationParams.__dataclass_fields__]
    return ReadPreset(values, tuple(each[:60] for each in ignored[:20]))


def _samplers(given: Mapping[str, Any], protocol: Any) -> dict[str, Any]:
    usual = GenerationParams()
    neutral = {name: neutral_values().get(name, getattr(usual, name)) for name in SAMPLERS}
    said = {name: value for name, value in read_request(protocol, given).items() if name in SAMPLERS}
    values = neutral | said
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    return values


def of_model(folder: Path) -> ReadPreset | None:
    """The makers' own values, from the folder's generation_config.json; None where it says nothing about sampling.

    Raises BadFile if the file is damaged.
    """
    found = read_json(folder / "generation_config.json", 1_000_000)
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
    given = {name: found[name] for name in names if found.get(name) is not None}
    if not given:
        return None
    if "do_sample" not in given and list(given) == ["repetition_penalty"]:  # transformers chooses no sampling by itself
        given["do_sample"] = False
    length = found.get("max_new_tokens")
    values = _samplers({"top_k": 50} | given, "host")  # transformers samples from 50 where nothing else is said
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        row = next(row for name, row, _default in GenerationParams.table() if name == "max_new_tokens")
        values["max_new_tokens"] = int(row.clamp(length))
    return ReadPreset(values)
