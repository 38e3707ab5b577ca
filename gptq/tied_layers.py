"""Packed layers that stand at several places of a model."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .dense_layers import replace
from .gptq_linear import GPTQLinear


def share_packed(model: PreTrainedModel) -> None:
    """Where layers are tied to each other (Zamba's shared blocks), the packed one stands at every place."""
    ties: Any = getattr(model, "all_tied_weights_keys", None)  # of transformers 5: target -> source
    for target, source in list((ties or {}).items()):
        names = [each.rpartition(".")[0] for each in (source, target)]
        modules = [model.get_submodule(each) for each in names]
        packed = [isinstance(each, GPTQLinear) for each in modules]
        if not any(packed) or any(isinstance(each, torch.nn.Embedding) for each in modules):
            continue
        del ties[target]
        if modules[0] is not modules[1] and not all(packed):
            replace(model, names[packed.index(False)], modules[packed.index(True)])
        if model.get_submodule(names[0]) is model.get_submodule(names[1]):
            parts = [part for part, _tensor in modules[packed.index(True)].named_parameters()]
            ties.update({f"{names[1]}.{part}": f"{names[0]}.{part}" for part in parts})
