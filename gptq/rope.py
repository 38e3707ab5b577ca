"""A context longer than a model was trained for, by turning its rotary position embedding (RoPE) slower.

Three options under the names that users of GPTQ models know: compress_pos_emb divides every position
(Chen et al. 2023, position interpolation), alpha_value raises the base (the "NTK-aware" rule of
2023), rope_freq_base sets the base outright. They change a transformers config before the model is
made from it, so whatever computes from that config obeys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import BadParameter

_PLAIN = ("default", "linear")  # kinds of scaling that positions may be divided in


@dataclass(frozen=True)
class Rope:
    compress_pos_emb: float = 1.0  # positions are divided by this
    alpha_value: float = 1.0  # the context grows about this many times
    rope_freq_base: float = 0.0  # 0: as the model has it; takes precedence over alpha_value

    def __post_init__(self) -> None:
        for name in ("compress_pos_emb", "alpha_value"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 1 <= value <= 64:
                raise BadParameter(f"{name} must be between 1 (changes nothing) and 64; found {value!r}.")
        base = self.rope_freq_base
        if not isinstance(base, (int, float)) or not (base == 0 or 100 <= base <= 1e9):
            raise BadParameter(f"rope_freq_base must be 0 (as the model has it) or between 100 and 1e9; found {base!r}.")

    @property
    def changes(self) -> bool:
        return self != Rope()

    def stretch(self, trained_base: float = 10000.0) -> float:
        """How many times longer a context becomes usable, by rule of thumb."""
        by_base = max(1.0, self.rope_freq_base / trained_base) ** 0.5 if self.rope_freq_base else self.alpha_value
        return self.compress_pos_emb * by_base


def apply(config: Any, rope: Rope) -> tuple[str, ...]:
    """Change a transformers config (4.57 or 5) in place; returns notes for the user.

    Raises BadParameter for a model without rotary positions, and for compress_pos_emb on one that
    has a scaling of its own.
    """
    if not rope.changes:
        return ()
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = None if config.model_type == "llama_alibi" else _parameters(config)
    if found is None:
        raise BadParameter(
            f"{type(config).__name__.removesuffix('Config')} models have no rotary positions: compress_pos_emb, alpha_value "
            "and rope_freq_base mean nothing there. Set them back to 1, 1 and 0."
        )
    old_base = found["rope_theta"]
    base = old_base
    if rope.rope_freq_base:
        base = float(rope.rope_freq_base)
    elif rope.alpha_value != 1:
        dim = _rotary_dim(config)
        base = old_base * rope.alpha_value ** (dim / (dim - 2))
    changed = {"rope_theta": base}
    if rope.compress_pos_emb != 1:
        kind = str(found.get("rope_type", "default"))
        if kind not in _PLAIN:
            raise BadParameter(
                f"This model has a position scaling of its own ({kind}); compress_pos_emb cannot be put on top. "
                "Set it to 1; alpha_value and rope_freq_base work."
            )
        changed |= {"rope_type": "linear", "factor": float(found.get("factor", 1.0)) * rope.compress_pos_emb}
    _write(config, changed)
    notes = [f"base {base:g} instead of {old_base:g}"] if base != old_base else []
    notes += [f"positions divided by {rope.compress_pos_emb:g}"] if rope.compress_pos_emb != 1 else []
    return (f"Rotary positions were changed: {', '.join(notes)}.",) if notes else ()


def _parameters(config: Any) -> dict[str, Any] | None:
    """rope_theta, rope_type and what belongs to it; of the layers with full attention where layers differ."""
    new = getattr(config, "rope_parameters", None)
    if isinstance(new, Mapping) and new:
        inner = new.get("full_attention") if "rope_theta" not in new else new
        return dict(inner) if isinstance(inner, Mapping) and inner.get("rope_theta") else None
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        return None
    scaling = getattr(config, "rope_scaling", None)
    scaling = dict(scaling) if isinstance(scaling, Mapping) else {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {**scaling, "rope_theta": float(theta), "rope_type": kind}


def _write(config: Any, changed: dict[str, Any]) -> None:
    new = getattr(config, "rope_parameters", None)
    if isinstance(new, Mapping) and new:
        if "rope_theta" in new:
            config.rope_parameters = {**new, **changed}
        else:
            config.rope_parameters = {**new, "full_attention": {**new["full_attention"], **changed}}
        return
    config.rope_theta = changed["rope_theta"]
    if "factor" in changed:
        config.rope_scaling = {"rope_type": "linear", "type": "linear", "factor": changed["factor"]}


def _rotary_dim(config: Any) -> int:
    """Numbers of a head that are rotated."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "rope_parameters", None)
    share = inner.get("partial_rotary_factor") if isinstance(inner, Mapping) else None
    share = share or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None) or 1.0
    return max(4, int(head * share))
