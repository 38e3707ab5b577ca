"""What transformers calls an architecture of 2023 now, as data: names, settings, and in what form files hold its layers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Successor:
    """What transformers calls an architecture now."""

    model_type: str
    renamed: Mapping[str, str] = field(default_factory=dict)  # settings: name then -> now
    fixed: Config = field(default_factory=dict)  # settings that were not written then
    # patterns in the names of tensors -> what stands there now; of each name one pattern is applied
    tensors: Mapping[str, str] = field(default_factory=dict)
    reckon: Callable[[Config], dict[str, Any]] | None = None  # settings then -> those now that have other values
    remark: Callable[[Config], str] | None = None  # settings then -> what the user should know, "" if nothing
    unlike: Callable[[Config], str] | None = None  # settings then -> why nothing of today computes the same, "" if it does
    left: tuple[str, ...] = ()  # settings that mean nothing now
    ropes: tuple[str, ...] = ()  # further kinds of rotary positions that are computed as today
    by_head: bool = False  # qkv_proj holds for each key head its queries, its key, its value; else all queries, keys, values
    repeats: bool = False  # layers have fewer key heads than the config now says, each of them for several
    unit_rows: bool = False  # each row of the output layer is divided by its length

    def notes(self, config: Config) -> list[str]:
        """What the user should know of a model with these settings, in sentences."""
        said = self.remark(config) if self.remark is not None else ""
        return [said] if said else []

    @property
    def cuts(self) -> bool:
        """Whether its files hold layers in another form than the model."""
        return self.repeats or any("qkv_proj" in now for now in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The class of transformers, as `architectures` of config.json names it; "" for one that is here alone."""
        return _CLASSES.get(self.model_type, "")


_CLASSES = {
    "falcon": "FalconForCausalLM", "glm": "GlmForCausalLM", "granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM",
    "phi": "PhiForCausalLM", "qwen2": "Qwen2ForCausalLM", "stablelm": "StableLmForCausalLM",
}  # fmt: skip


def in_layers(before: str, names: Mapping[str, str], at: str = r"(\d+)", now: str = r"\1") -> dict[str, str]:
    """Patterns of names in decoder layers. `before`: what stands before the layer's number."""
    start = rf"^{re.escape(before)}\.{at}\."
    return {rf"{start}{re.escape(then)}\.": f"model.layers.{now}.{new}." for then, new in names.items()}
