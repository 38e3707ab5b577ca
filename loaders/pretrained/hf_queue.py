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

        if "logits_to_keep" not in inspect.signature(function).parameters:
            return call

        def some(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
            """`generate` looks whether a forward takes this argument; without it, every token of a prompt gets logits."""
            return call(*args, logits_to_keep=logits_to_keep, **kwargs)

        return some


def _with_stop(criteria: Any, cancel: threading.Event) -> Any:
    from transformers import StoppingCriteriaList

    def stop(ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), cancel.is_set(), dtype=torch.bool, device=ids.device)

    return StoppingCriteriaList([*(criteria or ()), stop])
