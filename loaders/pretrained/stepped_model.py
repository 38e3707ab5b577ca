"""A model that answers through one of gptq's steppers, whatever holds its weights."""

import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from ...core.chat import Finish, Step
from ...core.errors import BadParameter
from ...core.models import LocalModel
from ...core.params import GenerationParams, obeyed_by
from ..contract.base import LoadedModel
from ..text import chat_template
from ..text.answer_rules import rules_of
from ..text.grammar_matcher import Grammars


class SteppedModel(LoadedModel):
    can = obeyed_by("own")
    can_embed = True

    def __init__(
        self,
        model: LocalModel,
        stepper: Any,  # gptq.stepper.Stepper
        tokenizer: Any,
        ends: set[int],  # ids that end an answer
        context_tokens: int,
        context_reason: str,
        notes: Sequence[str],
        device: str,
    ) -> None:
        from ...gptq.prefix_cache import PrefixCache

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
        self._stepper = stepper
        self._prefix: Any = PrefixCache()
        self._end_ids = ends
        self._grammars = Grammars(self.codec)

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        return self._computed(ids, params, cancel, self._stepper, self._prefix)

    def _adapter(self, params: GenerationParams) -> Any:
        """What the stepper takes for the adapters of an answer. Raises BadParameter."""
        return None

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
            adapter=self._adapter(params),
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
        self._adapter(params)
        if params.grammar is not None:
            if params.banned_strings:
                raise BadParameter("banned_strings and a grammar exclude each other. Leave one out.", "banned_strings")
            self._grammars.begin(params.grammar, self._ends())

    def close(self) -> None:
        super().close()
        self._grammars.close()
        if self._stepper is not None:
            self._release()

    def _release(self) -> None:
        """Free what holds memory, once nothing is computed any more."""
        self._prefix.clear()
        self._stepper.close()
        self._stepper = None

    def _ends(self) -> set[int]:
        return self._end_ids | set(self.template.stop_ids)
