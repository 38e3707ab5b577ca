"""A transformers PreTrainedModel that answers through one of gptq's steppers, and through calls of other programs."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...core.chat import Finish, Message, Step, Token
from ...core.errors import BadParameter
from ...core.models import LocalModel
from ...core.params import GenerationParams
from ...core.tools import ToolUse
from ..contract.model_prompt import Prompt
from ..contract.worker import Stream
from ..machine.memory_release import free_memory
from ..text.chat_template import ChatTemplate
from ..text.tokenizer import end_ids
from . import picture_reader
from .adapters import Adapters
from .hf_queue import QueuedCalls
from .stepped_model import SteppedModel


class PretrainedModel(SteppedModel):
    def __init__(
        self,
        model: LocalModel,
        hf: Any,
        stepper: Any,  # gptq.stepper.Stepper
        tokenizer: Any,
        context_tokens: int,
        context_reason: str,
        notes: Sequence[str],
        device: str,
    ) -> None:
        from ...gptq import peft_patch
        from ...gptq.picture_stepper import PictureStepper

        peft_patch.install()  # a program that is given `hf` may train or add adapters with PEFT
        ends = end_ids(hf.generation_config, tokenizer)
        super().__init__(model, stepper, tokenizer, ends, context_tokens, context_reason, notes, device)
        self.hf = hf
        self.embedding_rows = int(hf.get_input_embeddings().weight.shape[0])
        self.can_adapt = stepper.can_adapt
        self._adapters = Adapters(model, hf, stepper)
        stepper.take_over(hf, self._prefix)
        self._pictures, note = picture_reader.find(model.folder, hf.config, self.codec, self.template)
        self._picture_stepper = PictureStepper(hf) if self._pictures is not None else None
        self._calls = QueuedCalls(hf, self._worker)
        self.sees_pictures = self._pictures is not None
        self.notes = (*self.notes, note) if note else self.notes

    def prompt(
        self,
        source: str | Sequence[Message],
        tools: ToolUse | None = None,
        *,
        template: ChatTemplate | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        found = super().prompt(source, tools, template=template, options=options)
        urls = [url for each in found.messages or () for url in each.pictures]
        if not urls or self._pictures is None:
            return found
        ids, tensors = self._pictures.read(found.text, urls)
        return replace(found, ids=tuple(ids), pictures=tensors)

    def answer(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Stream[Token | Finish]:
        if prompt.pictures and params.adapters:
            raise BadParameter("An answer to pictures takes no LoRA adapter of its own. Leave one of the two out.", "adapters")
        return super().answer(prompt, params, cancel)

    def _steps_with(self, prompt: Prompt, params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        if not prompt.pictures or self._picture_stepper is None:
            return self._steps(list(prompt.ids), params, cancel)
        from ...gptq.prefix_cache import PrefixCache

        self._picture_stepper.show(prompt.pictures)
        return self._computed(list(prompt.ids), params, cancel, self._picture_stepper, PrefixCache())

    def _adapter(self, params: GenerationParams) -> Any:
        return self._adapters.of(params.adapters)

    def _release(self) -> None:
        device = self.hf.device
        self._calls.release()
        super()._release()
        self._adapters.clear()
        self.hf = self._picture_stepper = self._pictures = None
        free_memory(device)
