"""Which way of computing tokens a loaded model takes, and why. Tried from the fastest to the most general."""

import logging
from typing import Any

from ..core.errors import GptqWebuiError
from .llama import parts_of
from .stepper import Stepper, TransformersStepper

log = logging.getLogger(__name__)


def stepper_for(hf: Any, context_tokens: int) -> tuple[Stepper, str]:
    """(stepper, note for the user) for a transformers causal LM in eval mode; the note is empty if there is nothing to say."""
    device = hf.get_input_embeddings().weight.device
    if device.type != "cuda":
        return TransformersStepper(hf), ""
    from .cuda.linear import replace_layers
    from .cuda.stepper import CudaStepper
    from .cuda.weights import Unsuited

    try:
        parts = parts_of(hf)
        if parts is None:
            raise Unsuited("this architecture, or its place on several devices, has no step of its own")
        return CudaStepper(parts, context_tokens), ""
    except (Unsuited, GptqWebuiError) as error:
        why = str(error)
    log.info("the whole step is not used: %s", why)
    try:
        replaced, left = replace_layers(hf)
    except GptqWebuiError as error:
        return TransformersStepper(hf), f"Computed in plain PyTorch, slowly: {error}"
    if not replaced:
        return TransformersStepper(hf), f"Computed in plain PyTorch, slowly: {why}." if left else ""
    rest = f"; {left} of {replaced + left} layers in plain PyTorch" if left else ""
    return TransformersStepper(hf), f"Computed layer by layer, not in one step: {why}{rest}."
