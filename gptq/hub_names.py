"""The names that a model's layers and tensors have in files, where transformers 5 has renamed them: what other programs read.

transformers can turn its own conversions back. It is asked with tensors of one number for each expert: where a number comes out
is the name.
"""

from typing import Any

import torch
from torch import nn

from .expert_hessians import stacked


class HubNames:
    """Of a model with stacked experts. All other models keep their names: `key` and `layer` return what they are given."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._experts: dict[str, str] = {}
        self.joined: set[str] = set()  # experts that files of the 16-bit model hold in one tensor
        owners = stacked(model)
        self._renames = bool(owners)
        for owner, module in owners.items():
            self._experts |= self._of_experts(owner, module)

    def layer(self, name: str) -> str:
        """Of a linear layer, or one of an expert: 'model.layers.0.mlp.experts.1.gate_proj'."""
        return self._experts.get(name) or self.key(f"{name}.weight").removesuffix(".weight")

    def key(self, key: str) -> str:
        """Of a tensor that is as large in the files as in the model."""
        if not self._renames:
            return key
        found = list(self._reverted({key: torch.zeros(1)}))
        return found[0] if len(found) == 1 else key

    def _of_experts(self, owner: str, module: Any) -> dict[str, str]:
        count = module.down_proj.shape[0]
        first = ("gate_proj", "up_proj") if hasattr(module, "gate_up_proj") else ("up_proj",)
        joined = "gate_up_proj" if len(first) == 2 else "up_proj"
        named: dict[str, str] = {}
        for tensor, roles in ((joined, first), ("down_proj", ("down_proj",))):
            own = [f"{owner}.{at}.{role}" for at in range(count) for role in roles]
            probe = torch.arange(len(own)).view(count, len(roles), 1)
            found = self._reverted({f"{owner}.{tensor}": probe})
            if len(found) == len(own):
                named |= {own[int(value)]: name.removesuffix(".weight") for name, value in found.items()}
            else:
                self.joined.add(owner)
                named |= {name: name for name in own}
        return named

    def _reverted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4: no conversions
            return tensors
        found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, tensors)
        return found
