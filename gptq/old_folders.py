"""What is left to do once a folder of 2023 is loaded as its successor (core/old_families.py)."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import BadCheckpoint
from ..core.successor import Successor
from .gptq_linear import GPTQLinear


def as_successor(loaded: PreTrainedModel, old: Successor, *, packed: bool) -> None:
    """Make the model an ordinary one of its successor. Raises BadCheckpoint where its numbers cannot be changed."""
    if old.unit_rows:
        _divide_rows(loaded.get_output_embeddings())
    if not packed and old.cuts:  # the quantizer was there to hold layers until they were cut
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(loaded).pop(name, None)
        vars(loaded.config).pop("quantization_config", None)


@torch.no_grad()
def _divide_rows(head: Any) -> None:
    """Each row of the output layer by its length, as Baichuan 2's code does when it answers first."""
    if isinstance(head, GPTQLinear) or not isinstance(head, nn.Linear):
        raise BadCheckpoint(
            "The output layer is packed, and its architecture divides the numbers of each row by their length. "
            "Choose a branch with an output layer in 16 bits."
        )
    if head.weight.is_meta:
        raise BadCheckpoint(
            "The output layer does not fit into the memory of the device, and its numbers must be changed once. "
            "Load the model on one device: set the device, or choose a smaller model."
        )
    head.weight.data = nn.functional.normalize(head.weight.float()).to(head.weight.dtype)
