"""A draft model: a small one with the same tokenizer, which guesses the next words of a large one on a processor."""

import logging
from typing import Any

from ...core.errors import BadParameter
from ...core.foreign_errors import in_words, trace
from ...core.models import LocalModel
from ..contract.refusals import not_in_gptq_layout, unreadable
from ..machine import memory_fit
from ..text.tokenizer import read_tokenizer
from . import quick_imports
from .transformers_options import TransformersOptions

log = logging.getLogger(__name__)

_LEAST_TOKENS = 256  # of the draft model's context


class DraftModel:
    """Read before the large model, and given to its stepper afterwards."""

    def __init__(self, model: LocalModel, options: TransformersOptions, tokenizer: Any) -> None:
        """Looks at the folder and the tokenizer. `model`, `tokenizer`: of the large one.

        Raises BadParameter for a folder that is missing, is no model that can be opened, or has another tokenizer.
        """
        folder = options.draft(model)
        assert folder is not None, "only where a draft model is named"
        self.model, self._options = LocalModel.read(folder), options
        if refusal := unreadable(self.model) or (not_in_gptq_layout(self.model) if self.model.kind == "gptq" else None):
            raise BadParameter(
                f"{self.model.name} cannot be the draft model: {str(refusal).removesuffix('.')}. "
                "Choose another folder, or leave the setting empty."
            )
        _require_same(model, tokenizer, self.model, read_tokenizer(self.model, trust_remote_code=options.trust_remote_code))

    def bytes_on(self, device: Any) -> int:
        """Of a torch.device's memory, for its weights; 0 where it is not used."""
        if device.type != "cpu" or self._options.guesses == "off":
            return 0
        return memory_fit.weights_bytes(self.model, wide=True)

    def join(self, stepper: Any, context_tokens: int) -> str:
        """Load it, and let it guess for the stepper of the large model -> a note for the user.

        What hinders it is said in the note: the large model answers without it.
        """
        if self._options.guesses == "off":
            return "The draft model is not used: guessing ahead is off."
        if not stepper.can_draft:
            return (
                "The draft model is not used: it is for models that our own step computes on a processor, and whose rotary "
                "positions do not depend on the length of the text."
            )
        import torch

        from ...gptq import checkpoint
        from ...gptq.stepper_choice import stepper_for

        cpu = torch.device("cpu")
        try:
            memory_fit.require_memory(self.model, cpu, torch.float32)
            with quick_imports.stand_ins():
                hf, _notes = checkpoint.load(
                    self.model,
                    dtype=torch.float32,
                    device_map={"": cpu},
                    trust_remote_code=self._options.trust_remote_code,
                )
            context = min(context_tokens, self.model.context_tokens or context_tokens)
            draft, why = stepper_for(hf, context, guesses="off")
        except Exception as error:  # the large model is loaded by now, and needs no draft
            log.info("no draft model: %s", trace(error))
            return f"The draft model {self.model.name} is not used: {in_words(error)}."
        if draft.kernel != "cpu":
            draft.close()
            return (
                f"The draft model {self.model.name} is not used: {why.rstrip('.') or 'its architecture has no step of its own'}."
            )
        if draft.angles_of(1) != draft.angles_of(context) or context < _LEAST_TOKENS:
            draft.close()
            return (
                f"The draft model {self.model.name} is not used: its rotary positions depend on the length of the text, or its "
                "context is very short."
            )
        stepper.draft_with(draft, context)
        return f"{self.model.name} guesses next words where that is faster."


def _require_same(model: LocalModel, tokenizer: Any, draft: LocalModel, other: Any) -> None:
    """Raises BadParameter where an id is another token in the two."""
    own, theirs = ({id: token for token, id in each.get_vocab().items()} for each in (tokenizer, other))
    if own == theirs:
        return
    id = next(each for each in sorted({*own, *theirs}) if own.get(each) != theirs.get(each))
    here, there = (repr(each[id]) if id in each else "none" for each in (own, theirs))
    raise BadParameter(
        f"{draft.name} cannot be the draft model of {model.name}: they have different tokenizers. Token {id} is {there} in the "
        f"one and {here} in the other. Choose a model of the same family, or leave the setting empty."
    )
