"""Whether a LoRA adapter (a folder of the library PEFT) is for a given model: by the name of its base model, and by shapes.

An adapter names the 16-bit model that it was trained on; a GPTQ folder names it in its own name, its settings or its model card.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import WrongRepository
from ..core.folder_files import printable, read_json, read_text
from ..core.models import LocalModel
from ..core.safetensors_header import TensorInfo, read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES = 1_000_000  # of the settings, which are read each time the page lists adapters; real ones have a few kilobytes
HEADER_BYTES = 262_144  # of the weights: the shapes of a few hundred layers
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT = re.compile(r"^base_model:[ \t]*(?:\n\s*-[ \t]*)?['\"]?(\w[\w./-]*)", re.MULTILINE)
_AFTER = r"(gptq|awq|w4a16|int4|int8|\dbit|$)"  # what may follow the base model's name in a folder's
_README_BYTES = 1_000_000
_LARGEST_RANK = 65_536  # wider than any layer
_SHOWN = 200  # characters of a name


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's settings say."""

    base: str  # the model that it was trained on, as its author called it; "" if they do not say
    rank: int  # 0 if they do not say


def facts_of(config: Mapping[str, Any]) -> AdapterFacts:
    """Of an adapter_config.json, whatever is in it."""
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= _LARGEST_RANK:
        rank = 0
    return AdapterFacts(printable(base)[:_SHOWN] if isinstance(base, str) else "", rank)


def beside(folder: Path) -> dict[str, AdapterFacts]:
    """Name -> facts of every adapter in the folder that a model's own `folder` is in, whether it fits or not."""
    found: dict[str, AdapterFacts] = {}
    try:
        for each in sorted(folder.parent.iterdir()):
            if (each / CONFIG).is_file() and not (each / "config.json").exists():
                try:
                    found[each.name] = facts_of(read_json(each / CONFIG, CONFIG_BYTES))
                except Exception:
                    found[each.name] = AdapterFacts("", 0)
    except OSError:
        pass
    return found


def is_named(base: str, model: LocalModel) -> bool:
    """Whether the model is, by its names, a version of `base`; True where `base` is no name on the Hub, which says nothing."""
    if not _REPOSITORY.fullmatch(base):
        return True
    wanted = _plain(base)
    return any(re.match(re.escape(wanted) + _AFTER, name) for name in map(_plain, _names(model)))


def require_base(ref: object, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], model: LocalModel) -> None:
    """Raises WrongRepository if the adapter that these are the settings and shapes of is not for the model."""
    base = facts_of(config).base
    if not is_named(base, model):
        raise WrongRepository(
            f"{ref} is a LoRA adapter for {base[:120]}, and {model.name} is another model. Nothing was downloaded. "
            f"Load a GPTQ version of {base[:120]} first, then download the adapter for it."
        )
    if (wrong := _misfit(tensors, model)) is not None:
        raise WrongRepository(
            f"{ref} does not fit {model.name}: {wrong}. It is a LoRA adapter for another model. Nothing was downloaded. "
            f"Load the model that it was made for first{f', {base[:120]}' if base else ''}."
        )


def _names(model: LocalModel) -> Iterable[str]:
    """What a folder says about the model that it was made of."""
    yield model.name.split("_", 1)[-1].partition("_")[0]
    yield model.name
    for file, key in (("config.json", "_name_or_path"), ("quantize_config.json", "model_name_or_path")):
        try:
            found = read_json(model.folder / file).get(key)
        except Exception:
            continue
        if isinstance(found, str):
            yield found
    try:
        readme = read_text(model.folder / "README.md", _README_BYTES) if (model.folder / "README.md").is_file() else ""
    except Exception:
        return
    yield from _FRONT.findall(readme.partition("\n---")[0])


def _plain(name: str) -> str:
    """The last part of a name, in small letters and digits: "Org/Some-Model-7B" -> "somemodel7b"."""
    return re.sub(r"[^a-z0-9]", "", name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower())


def _misfit(tensors: Mapping[str, TensorInfo], model: LocalModel) -> str | None:
    """The first layer that does not fit, in words."""
    wanted: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in tensors.items():
        if found := _KEY.fullmatch(key):
            wanted.setdefault(found[1], {})[found[2]] = info.shape
    held: dict[str, TensorInfo] = {}
    for file in model.weights:
        if file.suffix == ".safetensors":
            held.update(read_header(file))
    for layer, pair in wanted.items():
        sizes = _sizes(layer, held, model)
        if sizes is None:
            continue  # stored under another name, for example as a part of a fused layer: loading it decides
        asked = (pair.get("A", (0, 0))[-1] or sizes[0], pair.get("B", (0, 0))[0] or sizes[1])
        if asked != sizes:
            return f"its part of {layer} is for {asked[0]} inputs and {asked[1]} outputs, the model has {sizes[0]} and {sizes[1]}"
    kinds = {name.split(".")[-2] for name in held if "." in name}
    if wanted and held and not kinds & {layer.rpartition(".")[2] for layer in wanted}:
        return f"the model has no layer like {printable(next(iter(wanted)))[:_SHOWN]}"
    return None


def _sizes(layer: str, held: Mapping[str, TensorInfo], model: LocalModel) -> tuple[int, int] | None:
    """(inputs, outputs) of a layer as the files hold it; None if they do not hold it under this name."""
    if (dense := held.get(f"{layer}.weight")) is not None and len(dense.shape) == 2:
        return dense.shape[1], dense.shape[0]
    packed, quantize = held.get(f"{layer}.qweight"), model.quantize
    if packed is None or quantize is None or model.kind != "gptq" or len(packed.shape) != 2:
        return None
    return packed.shape[0] * 32 // quantize.bits, packed.shape[1]
