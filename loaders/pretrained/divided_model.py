"""A model that several processes compute together, as a LoadedModel. Other programs are given no transformers model of it:
a call of its forward would leave the other processes behind."""

from typing import Any

from ...core.models import LocalModel
from ..machine.memory_release import free_memory
from ..text.tokenizer import end_ids
from .stepped_model import SteppedModel


class DividedModel(SteppedModel):
    def __init__(
        self,
        model: LocalModel,
        stepper: Any,  # gptq.parallel.rank_stepper.LeadingStepper
        generation_config: Any,
        tokenizer: Any,
        context_tokens: int,
        context_reason: str,
        notes: tuple[str, ...],
        device: Any,  # a torch.device
        ranks: int,
    ) -> None:
        ends = end_ids(generation_config, tokenizer)
        super().__init__(model, stepper, tokenizer, ends, context_tokens, context_reason, notes, str(device))
        self.embedding_rows = stepper.embedding_rows
        self._first_device, self.ranks = device, ranks

    @property
    def is_loaded(self) -> bool:
        """Whether it holds memory."""
        return self._stepper is not None

    @property
    def alive(self) -> bool:
        return super().alive and (self._stepper is None or self._stepper.alive)

    def _release(self) -> None:
        super()._release()
        free_memory(self._first_device)
