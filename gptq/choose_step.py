"""Which way of computing tokens a loaded model takes, and why. Tried from the fastest to the most general."""

from typing import Any

from .stepper import Stepper, TransformersStepper


def stepper_for(hf: Any, context_tokens: int) -> tuple[Stepper, str]:
    """(stepper, note for the user) for a transformers causal LM in eval mode; the note is empty if there is nothing to say."""
    return TransformersStepper(hf), ""
