"""A model loaded with ExLlamaV2: ids in, ids out, several answers in one step where the library can.

Text is ours (tokenizer, template, stop strings). Written for exllamav2 0.3.2, generator/dynamic.py
and generator/sampler.py.
"""

import importlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ...core.chat import Finish, Step
from ...core.models import LocalModel
from ...core.params import GenerationParams, obeyed_by
from ..contract.base import LoadedModel
from ..machine.memory_release import free_memory
from ..text import chat_template


class ExLlamaV2Model(LoadedModel):
    """One generator on the worker thread: each of its steps serves every answer that is being computed."""

    can = obeyed_by("exllamav2")

    def __init__(
        self,
        model: LocalModel,
        loaded: Any,
        generator: Any,
        tokenizer: Any,
        context_tokens: int,
        context_reason: str,
        notes: Sequence[str],
        parallel: int,
        ends: set[int],
    ) -> None:
        super().__init__(
            model,
            tokenizer,
            chat_template.find(model.folder, tokenizer, model.architecture),
            context_tokens=context_tokens,
            context_reason=context_reason,
            notes=notes,
            device="cuda",
            parallel=parallel,
        )
        self._loaded, self._generator, self._ends = loaded, generator, ends
        self._arrived: dict[int, deque[dict[str, Any]]] = {}  # serial of a job -> its results, not yet passed on

    def _steps(self, ids: Sequence[int], params: GenerationParams, cancel: threading.Event) -> Iterator[Step | Finish | None]:
        import torch

        library = importlib.import_module("exllamav2.generator")
        generator = self._generator
        room = min(params.max_new_tokens, self.context_tokens - len(ids))
        if room <= 0:
            yield Finish("length", prompt_tokens=len(ids))
            return
        ends = self._ends | set(self.template.stop_ids)
        job = library.ExLlamaV2DynamicJob(
            input_ids=torch.tensor([list(ids)], dtype=torch.long),
            max_new_tokens=room,
            gen_settings=settings_of(library.ExLlamaV2Sampler.Settings, params, generator.padded_vocab_size, ends),
            seed=params.seed,
            stop_conditions=sorted((set() if params.ignore_eos else ends) | set(params.stop_token_ids)),
        )
        serial = generator.enqueue(job)
        arrived = self._arrived[serial] = deque()
        self._note_reading(0, len(ids))
        done = False
        try:
            while True:
                if cancel.is_set():
                    yield Finish("cancelled", prompt_tokens=len(ids), cached_tokens=_cached(job, generator))
                    return
                if not arrived:
                    for result in generator.iterate():
                        if result["stage"] in ("streaming", "prefill") and result["serial"] in self._arrived:
                            self._arrived[result["serial"]].append(result)
                while arrived and arrived[0]["stage"] == "prefill":
                    self._note_reading(int(arrived.popleft().get("curr_progress", 0)), len(ids))
                if not arrived:
                    yield None  # a part of the prompt was read, or other answers use the cache
                    continue
                result = arrived.popleft()
                done = bool(result["eos"])
                if (new := result.get("token_ids")) is not None:
                    for id in new[0].tolist():
                        yield Step(id)
                if done:
                    reason = "length" if result.get("eos_reason") == "max_new_tokens" else "stop"
                    cached = int(result.get("cached_tokens", 0))
                    yield Finish(reason, prompt_tokens=len(ids), cached_tokens=cached)  # type: ignore[arg-type]
                    return
        finally:
            del self._arrived[serial]
            if not done:
                generator.cancel(job)

    def close(self) -> None:
        super().close()
        if self._loaded is None:
            return
        if (pool := getattr(self._generator, "sampling_pool", None)) is not None:
            pool.shutdown(wait=True)
        self._generator = None
        self._loaded.unload()
        self._loaded = None
        free_memory(_gpu())


class Ids:
    """In place of the library's own tokenizer: the library never sees text, only how many ids there are."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pieces = [""] * count

    def get_vocab_size(self) -> int:
        return self._count

    def get_id_to_piece_list(self, include_special_tokens: bool = False) -> list[str]:
        return self._pieces

    def decode(self, ids: Any, decode_special_tokens: bool = False) -> list[str]:
        return [""]


def settings_of(make: Callable[..., Any], params: GenerationParams, vocabulary: int, ends: Collection[int] = ()) -> Any:
    """The library's sampler settings; `ends` are the ids that end an answer. Its penalties look at the prompt too."""
    settings = make(
        temperature=params.temperature or 1.0,
        top_k=params.top_k if params.temperature else 1,
        top_p=max(params.top_p, 1e-6) if params.temperature else 0.0,  # the library's 0 keeps all
        min_p=params.min_p if params.temperature else 0.0,
        typical=params.typical_p if params.temperature and params.typical_p < 1 else 0.0,
        token_repetition_penalty=params.repetition_penalty,
        token_repetition_range=params.repetition_range or -1,
        token_presence_penalty=params.presence_penalty,
        token_frequency_penalty=params.frequency_penalty,
        xtc_probability=params.xtc_probability if params.temperature else 0.0,
        xtc_threshold=params.xtc_threshold,
    )
    banned = {*params.custom_token_bans, *(ends if params.ignore_eos else ())}
    if params.logit_bias or banned:
        import torch

        settings.token_bias = torch.zeros(vocabulary, dtype=torch.float)
        for id, bias in (*params.logit_bias, *((each, float("-inf")) for each in banned)):
            if id < vocabulary:
                settings.token_bias[id] = bias
    return settings


def _cached(job: Any, generator: Any) -> int:
    return int(job.cached_pages * generator.page_size + job.cached_tokens)


def _gpu() -> Any:
    import torch

    return torch.device("cuda")
