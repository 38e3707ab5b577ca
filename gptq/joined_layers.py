"""Layers that transformers holds as one and a file holds as several: gptqmodel cuts Phi-3's and GLM-4's gate_up_proj in two.

While the files are read, the parts have the names of the files; then they move into the joined layer.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "qkv_proj": ("q_proj", "k_proj", "v_proj")}


class JoinedLayers(nn.Module):
    """y = the outputs of several layers of one input, one after the other."""

    def __init__(self, names: tuple[str, ...]) -> None:
        """`names`: of the parts, in the order of their outputs."""
        super().__init__()
        self.names = names

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return tuple(self.get_submodule(each) for each in self.names)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([each(x) for each in self.parts], -1)


def parts_of_layer(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that a layer is made of: itself, or its parts."""
    return module.parts if isinstance(module, JoinedLayers) else (module,)


def joined_names(names_of_files: Iterable[str], modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """Joined layer of the model -> names of its parts, where the files have all of the parts and the model has none."""
    have = set(names_of_files)
    found = {}
    for name in have - set(modules):
        owner, _dot, last = name.rpartition(".")
        for joined, parts in JOINED.items():
            names = tuple(f"{owner}.{each}" for each in parts)
            if last in parts and isinstance(modules.get(f"{owner}.{joined}"), nn.Linear) and have.issuperset(names):
                found[f"{owner}.{joined}"] = names
    return found


def move_parts(model: nn.Module) -> None:
    """Once the files are read, put the parts where they are computed."""
    for name, joined in list(model.named_modules()):
        if isinstance(joined, JoinedLayers):
            parent = model.get_submodule(name.rpartition(".")[0])
            for each in joined.names:
                if each not in dict(joined.named_children()):
                    joined.add_module(each, parent.get_submodule(each))
                    delattr(parent, each)
