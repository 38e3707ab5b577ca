"""A transformers PreTrainedModel that answers through one of gptq's steppers, and through calls of other programs."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from ...core.chat import Finish, Step
from ...core.errors import BadParameter
from ...core.models import LocalModel
from ...core.params import GenerationParams, obeyed_by
from ..contract.base import LoadedModel
from ..machine.memory_release import free_memory
from ..text import chat_template
from ..text.answer_rules import rules_of
from ..text.grammar_matcher import Grammars
from ..text.tokenizer import end_ids
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
        self._calls = QueuedCalls(hf, self._worker)

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        from ...gptq.generation import generate

        ends = self._ends()
        rules = rules_of(self.codec, params, ends, ids)
        self._note_reading(0, len(ids))
        return generate(
            self._stepper,
            ids,
            params,
            cancel,
            prefix=self._prefix,
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

    def _vector(self, ids: Sequence[int], pooling: str, cancel: threading.Event) -> list[float]:
        from ...gptq.prompt_scores import embed

        return embed(self._stepper, ids, pooling, cancel)

    def _is_alone(self, params: GenerationParams) -> bool:
        if self._stepper.all_in_turns:
            return False
        return params.grammar is not None or not params.in_one_pass  # computed one by one, in buffers that all answers share

    def check(self, params: GenerationParams) -> None:
        super().check(params)
        self._adapters.of(params.adapters)
        if params.grammar is not None:
            if params.banned_strings:
                raise BadParameter("banned_strings and a grammar exclude each other. Leave one out.", "banned_strings")
            self._grammars.begin(params.grammar, self._ends())

    def close(self) -> None:
        super().close()
        if self.hf is None:
            return
        device = self.hf.device
        self._calls.release()
        self._prefix.clear()
        self._stepper.close()
        self._adapters.clear()
        self.hf = self._stepper = None
        free_memory(device)

    def _ends(self) -> set[int]:
        return self._end_ids | set(self.template.stop_ids)
