"""Calls of other programs wait in the queue too.

A program written for transformers calls `model.generate` or `model(...)` from threads of its own
(text-generation-webui does). These calls are passed to the model's worker thread, so they wait in the same queue as
our own answers, and closing the model waits for them. They compute in the same memory as our answers, so each runs
alone: it begins when no answer is under way, and none begins while it runs.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ...gptq.token_ids import require_known
from ..contract.worker import Worker

_ARGS, _KWARGS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


class QueuedCalls:
    """Puts `generate` and `forward` of a transformers model behind a worker, until `release`."""

    def __init__(self, hf: Any, worker: Worker) -> None:
        self._hf = hf
        self._worker = worker
        self._own = {name: vars(hf).get(name) for name in ("generate", "forward")}  # accelerate puts its hooks there too
        for name in self._own:
            setattr(hf, name, self._queued(getattr(hf, name), stoppable=name == "generate"))

    def release(self) -> None:
        """Leave the model as it was."""
        for name, own in self._own.items():
            if own is None:
                delattr(self._hf, name)
            else:
                setattr(self._hf, name, own)
        self._hf, self._own = None, {}  # an accelerate hook in it would keep the weights alive

    def _require_known(self, ids: Any) -> None:
        """Raises BadParameter for a token that the model has no embedding of: on a GPU it would end every later answer."""
        import torch

        hf = self._hf  # None once the model is unloaded: the queue says so
        if hf is not None and isinstance(ids, torch.Tensor) and ids.numel() and not ids.is_floating_point():
            require_known([int(each) for each in ids.aminmax()], int(hf.get_input_embeddings().weight.shape[0]))

    def _queued(self, function: Callable[..., Any], stoppable: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._worker.is_current():
                return function(*args, **kwargs)
            import torch

            self._require_known(kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None)))
            gradients = torch.is_grad_enabled()  # a mode of the calling thread
            result: list[Any] = []
            error: list[BaseException] = []
            cancel = threading.Event()
            if stoppable:  # closing the model ends it within one token
                kwargs["stopping_criteria"] = _with_stop(kwargs.get("stopping_criteria"), cancel)

            def job() -> Iterator[None]:
                try:
                    with torch.set_grad_enabled(gradients):
                        result.append(function(*args, **kwargs))
                except BaseException as raised:  # it belongs to the caller, whatever it is
                    error.append(raised)
                yield None

            for _ in self._worker.stream(job, cancel, None, alone=True):
                pass
            if error:
                raise error[0]
            if not result:
                raise RuntimeError("The model was unloaded before this call began.")
            return result[0]

        return self._passing_on(call, function)

    def _passing_on(self, call: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which says what it passes its arguments on to (read in patched_forward.py; a copy of it says nothing).

        `generate` looks which arguments a forward takes. Most models show `logits_to_keep` alone, without which every token of a
        prompt gets logits: a mask would leave out tokens of a prompt that are the padding token too. Those that prepare
        their inputs by themselves show all: without a mask and positions Qwen2-VL fails in transformers 4.
        """
        from transformers import GenerationMixin

        signature, usual = inspect.signature(function), GenerationMixin.prepare_inputs_for_generation
        if isinstance(self._hf, GenerationMixin) and type(self._hf).prepare_inputs_for_generation is usual:
            given = [inspect.Parameter(name, kind) for name, kind in (("args", _ARGS), ("kwargs", _KWARGS))]
            if (keep := signature.parameters.get("logits_to_keep")) is not None:
                given.insert(1, keep.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            signature = inspect.Signature(given)
        call.__signature__ = signature  # type: ignore[attr-defined]
        call.passes_on = (call, function)  # type: ignore[attr-defined]
        return call


def _with_stop(criteria: Any, cancel: threading.Event) -> Any:
    from transformers import StoppingCriteriaList

    def stop(ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), cancel.is_set(), dtype=torch.bool, device=ids.device)

    stop.ends_now = cancel.is_set  # type: ignore[attr-defined]  # gptq/sampling_loop.py asks the host alone
    return StoppingCriteriaList([*(criteria or ()), stop])
