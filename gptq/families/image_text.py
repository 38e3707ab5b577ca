"""The language model inside of a model that sees pictures: where there are none, it is computed as it would be alone."""

from typing import Any

from torch import Tensor, nn


class LanguageModel:
    """What the families read of a causal LM, of the part of `hf` that reads and writes text."""

    def __init__(self, hf: Any, text: nn.Module) -> None:
        self.config = hf.config.get_text_config(decoder=True)
        self.model = self.base_model = text
        self.get_input_embeddings, self.get_output_embeddings = hf.get_input_embeddings, hf.get_output_embeddings


class OnePosition(nn.Module):
    """A rotary module of a model that gives each token three positions (time, row, column): of text, all three are one."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        vars(self)["rotary"] = rotary  # no child: it stays where it is
        self.rope_type = rotary.rope_type

    @property
    def inv_freq(self) -> Tensor:
        found: Tensor = vars(self)["rotary"].inv_freq
        return found

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] -> cos and sin [B, T, D]."""
        cos, sin = vars(self)["rotary"](x, positions[None].expand(3, -1, -1))
        return (cos, sin) if cos.dim() == 3 else (cos[0], sin[0])  # transformers 4 gives those of each of the three


def language_model(hf: Any) -> Any:
    """`hf` itself, or the view of its language model if it is a model that sees pictures."""
    text = getattr(getattr(hf, "model", None), "language_model", None) or getattr(getattr(hf, "model", None), "text_model", None)
    if text is None or not hasattr(hf.config, "get_text_config") or hf.config.get_text_config(decoder=True) is hf.config:
        return hf
    return LanguageModel(hf, text)
