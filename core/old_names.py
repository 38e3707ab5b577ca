"""Settings of 2023 in today's words: models whose architecture came as program code at first, and which transformers has since
then under another name. Their code is not run. The families are in old_families.py: one entry for each.
"""

import re
from collections.abc import Mapping
from typing import Any

from .config_numbers import shown
from .old_families import FAMILIES
from .successor import Successor

_ROPES = ("default", "linear", "dynamic")  # kinds of rotary positions that programs of 2023 compute as transformers does


def successor_of(config: Mapping[str, Any]) -> Successor | None:
    """The architecture that a config.json with a name of 2023 is of now; None for a name that is no such one."""
    kind = config.get("model_type")
    found = FAMILIES.get(kind) if isinstance(kind, str) else None
    return found(config) if callable(found) else found


def why_unlike(config: Mapping[str, Any], to: Successor) -> str:
    """Why a model computes something that its successor does not: the end of a sentence; "" where both are the same."""
    if to.unlike is not None and (why := to.unlike(config)):
        return why
    scaling = config.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else None
    if kind not in (None, *_ROPES, *to.ropes):
        return f"its rotary positions are of the kind {shown(kind)}, which its own code computes in its own way"
    return ""


def renewed(config: Mapping[str, Any], to: Successor) -> dict[str, Any]:
    """The settings in today's words, without model_type and without what points to program code."""
    left = {"model_type", "auto_map", "architectures", "transformers_version", *to.left}
    now = {to.renamed.get(name, name): value for name, value in config.items() if name not in left}
    reckoned = to.reckon(config) if to.reckon is not None and not why_unlike(config, to) else {}
    return {**to.fixed, **now, **reckoned}


def in_todays_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose numbers have today's names: itself, or that of its successor, which keeps its own model_type."""
    to = successor_of(config)
    kept = {name: config[name] for name in ("model_type", "architectures") if name in config}
    return config if to is None else {**renewed(config, to), **kept}


def name_now(name: str, renamed: Mapping[str, str]) -> str:
    """Today's name of a layer or of a tensor. `renamed`: `Successor.tensors`."""
    key = f"{name}."
    for pattern, now in renamed.items():
        key, count = re.subn(pattern, now, key)
        if count:
            break
    return key.removesuffix(".")


def for_new_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of files that are written anew, with the names of tensors that a loaded model has: itself, or that of its
    successor."""
    to = successor_of(config)
    if to is None:
        return dict(config)
    return {**renewed(config, to), "model_type": to.model_type, "architectures": [to.architecture]}


def why_not_written(config: Mapping[str, Any]) -> str:
    """Why no files can be written of a model that other programs would read, as a sentence; "" if they can."""
    to = successor_of(config)
    if to is None or to.architecture:
        return ""
    return (
        "Its architecture came as program code, and transformers has it under no name: other programs could not read what is "
        "written."
    )
