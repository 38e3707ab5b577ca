"""Transformers with our own packed layers (gptq/): every GPTQ width and layout, and 16-bit models.

Runs wherever torch does. torch and transformers are imported when a model is loaded, not before.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

from ...core.errors import LoadFailed, NotEnoughMemory
from ...core.models import LocalModel
from ...core.safetensors_header import headers_kept
from ...core.units import format_bytes
from ..contract import superhot
from ..contract.base import Loader, LoadProgress, Refusal, Remark
from ..contract.refusals import not_in_gptq_layout, unreadable
from ..machine import gpus, memory_fit
from ..machine.memory_release import free_memory
from ..pretrained import picture_reader
from ..pretrained.pretrained_model import PretrainedModel
from ..pretrained.stepped_model import SteppedModel
from ..text.tokenizer import read_tokenizer
from . import divided_load, early_start, optimum, quick_imports
from .draft_model import DraftModel
from .early_start import EarlyStart, Placed
from .transformers_options import MOST_PARALLEL, TransformersOptions, device_of, dtype_of, free_beside, placement

__all__ = ["TransformersLoader", "TransformersOptions"]

log = logging.getLogger(__name__)


class TransformersLoader(Loader):
    name: ClassVar[str] = "transformers"
    options: ClassVar[type] = TransformersOptions
    reason: ClassVar[str] = "reads every GPTQ layout and 16-bit models, with nothing to compile"
    context_option: ClassVar[str] = "context_tokens"
    divides_by_itself = True  # a model that is too large for one GPU, where the user leaves it open

    def refusal(self, model: LocalModel, options: TransformersOptions) -> Refusal | None:
        machine = self._machine()
        for package in ("torch", "transformers", "accelerate"):
            if not machine.has(package):
                return Refusal(f"the package {package} is not installed", f"pip install {package}")
        if options.device == "cuda" and not machine.cuda:
            return Refusal("there is no GPU that torch can use", "choose the device auto or cpu")
        refused = unreadable(model) or (not_in_gptq_layout(model) if model.kind == "gptq" else None)
        if refused is None and options.tensor_parallel > 1:
            return divided_load.refusal(model, options, machine)
        return refused or (optimum.refusal(model, machine) if options.kernel == "optimum" else None)

    def remark(self, model: LocalModel, options: TransformersOptions) -> Remark | None:
        return optimum.remark(model, self._machine()) if options.kernel == "optimum" and model.kind == "gptq" else None

    def without_effect(self, model: LocalModel, options: TransformersOptions) -> dict[str, str]:
        """Options that would change nothing for a model here -> why."""
        why = options.no_cache_type(model, self._machine().cuda)
        return {"cache_type": why} if why else {}

    def fit(self, model: LocalModel, options: TransformersOptions, memory: memory_fit.Memory) -> memory_fit.Fit:
        options, _why = self._chosen(model, options, memory)
        if options.tensor_parallel > 1:
            memory = divided_load.of_every_gpu(memory, options.tensor_parallel)
        return super().fit(model, options, memory)

    def _chosen(
        self, model: LocalModel, options: TransformersOptions, memory: memory_fit.Memory
    ) -> tuple[TransformersOptions, str]:
        """(with the number of GPUs that compute together, a note or "")."""
        gpu = memory.gpu is not None
        if not self.divides_by_itself and not options.tensor_parallel:
            return replace(options, tensor_parallel=1), ""
        return divided_load.chosen(model, options, self._machine(), memory, lambda each: self.demand(model, each, gpu))

    def demand(self, model: LocalModel, options: TransformersOptions, gpu: bool) -> memory_fit.Demand:
        return options.for_model(model).demand(model, gpu)

    def load(self, model: LocalModel, options: TransformersOptions, progress: LoadProgress) -> SteppedModel:
        progress(0.02, "Starting torch and transformers")
        given, options = options, options.for_model(model)
        early_start.wake_driver(options.device)
        with quick_imports.torch_alone():
            import_module("torch")
        early = EarlyStart(partial(self._placed, model, options), at_once=options.is_plain)
        try:
            with headers_kept():
                return self._load(model, given, options, early, progress)
        finally:
            early.close()

    def _placed(self, model: LocalModel, options: TransformersOptions) -> Placed:
        """Where a model goes, and its weights on their way there. Imports nothing of transformers for plain options."""
        import torch

        from ...gptq.early_weights import early_weights

        device = device_of(options)
        if device.type == "cuda":
            try:
                torch.zeros(1, device=device)
            except RuntimeError as error:
                log.info("the GPU did not start (%s)", error)  # whoever needs it hears so again
        gpus.ask_anew()
        options, why = self._chosen(
            model, options, memory_fit.Memory(0, memory_fit.available_bytes(device) if device.type == "cuda" else None)
        )
        if options.tensor_parallel > 1:
            return Placed(options, why, device)
        dtype = dtype_of(options, device)
        memory_fit.require_memory(model, device, dtype)
        device_map, max_memory = placement(model, options, device, dtype)
        whole = max_memory is None and model.is_packed and options.kernel == "native"
        return Placed(
            options, why, device, dtype, device_map, max_memory, early_weights(model.weights, device) if whole else None
        )

    def _load(
        self,
        model: LocalModel,
        given: TransformersOptions,
        options: TransformersOptions,
        early: EarlyStart,
        progress: LoadProgress,
    ) -> SteppedModel:
        import torch

        with quick_imports.without_unused():
            from transformers.utils import logging as transformers_logging

            from ...gptq import checkpoint, lora
            from ...gptq.stepper_choice import preparing, stepper_for
            from ...gptq.transformers_stepper import TransformersStepper

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        adapter = options.adapter(model)
        stretched = (superhot.note(options.compress_pos_emb),) if options != given else ()
        placed = early.placed()
        options, device, why = placed.options, placed.device, placed.why
        if options.tensor_parallel > 1:
            loaded, why = divided_load.load_or_leave(model, options, progress, optional=not given.tensor_parallel)
            if loaded is not None:
                loaded.notes = (*loaded.notes, *stretched)
                return loaded
            options = replace(options, tensor_parallel=1)
            dtype = dtype_of(options, device)
            memory_fit.require_memory(model, device, dtype)
            device_map, max_memory = placement(model, options, device, dtype)
        else:
            dtype, device_map, max_memory = placed.dtype, placed.device_map, placed.max_memory
        progress(0.1, "Reading the tokenizer")
        tokenizer = read_tokenizer(model, trust_remote_code=options.trust_remote_code)
        draft = DraftModel(model, options, tokenizer) if options.draft(model) is not None else None
        progress(0.15, f"Reading {format_bytes(model.size_bytes)} of weights")
        foreign = options.kernel == "optimum" and model.kind == "gptq"
        try:
            more = {} if foreign else {"early": placed.weights}
            with nullcontext() if foreign else quick_imports.stand_ins():
                hf, notes = (optimum.load if foreign else checkpoint.load)(
                    model,
                    dtype=dtype,
                    device_map=device_map,
                    max_memory=max_memory,
                    attn_implementation=None if options.attn_implementation == "auto" else options.attn_implementation,
                    rope=options.rope,
                    progress=_arrived(progress),
                    trust_remote_code=options.trust_remote_code,
                    **more,
                )
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "out of memory" not in str(error).lower():
                raise
            early.close()
            free_memory(device)
            raise NotEnoughMemory(
                f"There is not enough memory on {_device_name(device)} for {model.name} ({format_bytes(model.size_bytes)}). "
                "Close other programs, or choose a smaller branch (fewer bits, larger group)."
            ) from None
        early.close()
        notes = (*notes, *([why] if why else ()), *stretched)
        progress(0.95, "Fitting the conversation into the memory")
        demand, free_bytes = options.demand(model, device.type == "cuda"), free_beside(hf, device)
        try:
            context, reason = memory_fit.fit_context(model, demand, free_bytes - (draft.bytes_on(device) if draft else 0))
        except LoadFailed as error:
            del hf
            free_memory(device)
            if draft is not None and (size := draft.bytes_on(device)):
                raise NotEnoughMemory(
                    f"{error} Or leave Draft model empty: {draft.model.name} takes {format_bytes(size)}."
                ) from None
            raise
        progress(0.97, preparing(device))
        adapt = None if adapter is None else partial(lora.attach, hf, adapter)
        sees = picture_reader.may_see(model.folder, hf.config)
        asked = partial(
            stepper_for,
            cache_type=options.cache_type,
            parallel=options.parallel or MOST_PARALLEL,
            guesses=options.guesses,
            adapt=adapt,
            pictures=sees,
        )
        if foreign and adapt is not None:
            adapt()
        stepper, note = (TransformersStepper(hf), "") if foreign else asked(hf, context)
        notes = (*notes, note) if note else notes
        if draft is not None:
            progress(0.98, f"Reading the draft model, {draft.model.name}")
            notes = (*notes, draft.join(stepper, context))
        whole = PretrainedModel(model, hf, stepper, tokenizer, context, reason, notes, str(device))
        progress(1.0, "Ready")
        return whole


def _arrived(progress: LoadProgress) -> Callable[[int, int, int, int], None]:
    """What gptq/load_progress.py reports, in a user's words."""

    def report(done_bytes: int, all_bytes: int, done_layers: int, all_layers: int) -> None:
        share = done_bytes / max(1, all_bytes)
        text = f"Reading the weights: {format_bytes(done_bytes)} of {format_bytes(all_bytes)}"
        progress(0.15 + 0.78 * share, text + (f", {done_layers} of {all_layers} layers" if all_layers else ""))

    return report


def _device_name(device: Any) -> str:
    return "the GPU" if device.type == "cuda" else "this machine"
