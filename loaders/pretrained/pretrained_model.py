"""A transformers PreTrainedModel that answers through one of gptq's steppers, and through calls of other programs."""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...core.chat import Finish, Message, Step, Token
from ...core.errors import BadParameter
from ...core.models import LocalModel
from ...core.params import GenerationParams, obeyed_by
from ...core.tools import ToolUse
from ..contract.base import LoadedModel
from ..contract.model_prompt import Prompt
from ..contract.worker import Stream
from ..machine.memory_release import free_memory
from ..text import chat_template
from ..text.answer_rules import rules_of
from ..text.chat_template import ChatTemplate
from ..text.grammar_matcher import Grammars
from ..text.tokenizer import end_ids
from . import picture_reader
from .adapters import Adapters
from .hf_queue import QueuedCalls


class PretrainedModel(LoadedModel):
    can = obeyed_by("own")
    can_embed = True

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
        from ...gptq.prefix_cache import PrefixCache

        peft_patch.install()  # a program that is given `hf` may train or add adapters with PEFT
        super().__init__(
            model,
            tokenizer,
            chat_template.find(model.folder, tokenizer, model.architecture),
            context_tokens=context_tokens,
            context_reason=context_reason,
            notes=notes,
            device=device,
            kernel=stepper.kernel,
            parallel=stepper.parallel,
        )
        self.hf = hf
        self.embedding_rows = int(hf.get_input_embeddings().weight.shape[0])
        self._stepper = stepper
        self._prefix: Any = PrefixCache()
        self._end_ids = end_ids(hf.generation_config, tokenizer)
        self._grammars = Grammars(self.codec)
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

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        return self._computed(ids, params, cancel, self._stepper, self._prefix)

    def _computed(
        self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event, stepper: Any, prefix: Any
    ) -> Iterator[Step | Finish | None]:
        from ...gptq.generation import generate

        ends = self._ends()
        rules = rules_of(self.codec, params, ends, ids)
        self._note_reading(0, len(ids))
        return generate(
            stepper,
            ids,
            params,
            cancel,
            prefix=prefix,
            end_ids=ends,
            rules=rules,
            context_tokens=self.context_tokens,
            grammar_mask=self._grammars.begin(params.grammar, ends) if params.grammar is not None else None,
            progress=lambda read: self._note_reading(read, len(ids)),
            adapter=self._adapters.of(params.adapters),
        )

    def _scores(self, ids: Sequence[int], top: int, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        from ...gptq.prompt_scores import score

        return score(self._stepper, ids, top, cancel, lambda read: self._note_reading(read, len(ids)))

    def _reads_alone(self) -> bool:
        return False

    def _vector(self, ids: Sequence[int], pooling: str, cancel: threading.Event) -> Generator[None, None, list[float]]:
        from ...gptq.prompt_scores import embed

        return embed(self._stepper, ids, pooling, cancel)

    def _is_alone(self, params: GenerationParams) -> bool:
        return not self._stepper.in_turns(params)  # computed one by one, in buffers that all answers share

    def check(self, params: GenerationParams) -> None:
        super().check(params)
        self._adapters.of(params.adapters)
        if params.grammar is not None:
            if params.banned_strings:
                raise BadParameter("banned_strings and a grammar exclude each other. Leave one out.", "banned_strings")
            self._grammars.begin(params.grammar, self._ends())

    def close(self) -> None:
        super().close()
        self._grammars.close()
        if self.hf is None:
            return
        device = self.hf.device
        self._calls.release()
        self._prefix.clear()
        self._stepper.close()
        self._adapters.clear()
        self.hf = self._stepper = self._picture_stepper = self._pictures = None
        free_memory(device)

    def _ends(self) -> set[int]:
        return self._end_ids | set(self.template.stop_ids)
