"""Settings of 2023 in today's words: models whose architecture came as program code at first, and which transformers has since
then under another name. Their code is not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Successor:
    """What transformers calls an architecture now."""

    model_type: str
    renamed: Mapping[str, str] = field(default_factory=dict)  # settings: name then -> now
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that were not written then
    tensors: Mapping[str, str] = field(default_factory=dict)  # patterns in the names of tensors -> what stands there now


_FALCON = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
_OLD: Mapping[str, Successor] = {
    "RefinedWebModel": Successor("falcon", _FALCON),
    "RefinedWeb": Successor("falcon", _FALCON, {"new_decoder_architecture": True}),  # the 40B
    "Yi": Successor("llama", tensors={r"\.ln1\.": ".input_layernorm.", r"\.ln2\.": ".post_attention_layernorm."}),
    "stablelm_epoch": Successor("stablelm", {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}),
}


def successor_of(config: Mapping[str, Any]) -> Successor | None:
    """The architecture that a config.json with a name of 2023 is of now; None for a name that is no such one."""
    kind = config.get("model_type")
    return _OLD.get(kind) if isinstance(kind, str) else None


def renewed(config: Mapping[str, Any], to: Successor) -> dict[str, Any]:
    """The settings in today's words, without model_type and without what points to program code."""
    left = {"model_type", "auto_map", "architectures", "transformers_version"}
    return {**to.fixed, **{to.renamed.get(name, name): value for name, value in config.items() if name not in left}}
