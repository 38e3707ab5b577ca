"""What a training of an adapter is given and says, without a heavy import: lora_training.py does it."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import LoadFailed


@dataclass(frozen=True)
class Example:
    """A text of the training set."""

    ids: Sequence[int]
    learned: Sequence[bool]  # as long: whether the token counts in the loss


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    rank: int = 16
    alpha: int = 32  # the adapter is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's inputs
    targets: tuple[str, ...] = ()  # last names of layers ("q_proj"); empty: every linear layer of the decoder
    learning_rate: float = 2e-4  # the highest, after the warm-up; it falls as a cosine
    epochs: int = 3
    batch: int = 4  # texts of a step
    warmup: float = 0.05  # share of the steps
    seed: int = 0


@dataclass(frozen=True)
class StepDone:
    step: int  # from 1
    count: int  # of steps
    losses: Sequence[float]  # of every step so far: nats per learned token
    resumed: bool = False  # an earlier run had made it: said once, for its last step


def require_peft() -> None:
    """Raises LoadFailed where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise LoadFailed('Training needs the library PEFT. Install it with: pip install "gptq-webui[train]"')


def steps_of(texts: int, recipe: Recipe) -> int:
    """Steps of a whole training."""
    return -(-texts // recipe.batch) * recipe.epochs
