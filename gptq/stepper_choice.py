"""Which way of computing tokens a loaded model takes, and why. Tried from the fastest to the most general."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..core.errors import GptqWebuiError
from .cpu import numba_compiler
from .experts import PackedExperts
from .families.known import parts_for_gpu, parts_of
from .stepper import Stepper
from .suitability import Unsuited, require_sound
from .transformers_stepper import TransformersStepper
from .unpacked_products import hold_dense

log = logging.getLogger(__name__)


_ADAPTED = "a LoRA adapter is added to single layers"


def stepper_for(
    hf: Any,
    context_tokens: int,
    *,
    cache_type: str = "fp16",
    parallel: int = 1,
    guesses: str = "auto",
    adapt: Callable[[], object] | None = None,  # changes layers once they have their kernels; only layer by layer
    pictures: bool = False,  # the model's own forward will read pictures too
) -> tuple[Stepper, str]:
    """(stepper, note for the user) for a transformers causal LM in eval mode; the note is empty if there is nothing to say.

    Raises BadCheckpoint for packed layers that are not what they claim. May take over the memory of packed layers.
    `cache_type` ("fp16", "q8") is for the step on a GPU; the others keep the conversation as they compute it. `parallel`
    (answers at once) is for our own steps and for recorded forwards; the others compute one at a time. `guesses` ("auto", "on",
    "off": whether next tokens are guessed, where that is faster) is for our own steps.
    """
    require_sound(hf)
    device = hf.get_input_embeddings().weight.device
    if device.type == "cuda":
        stepper, note = _on_gpu(hf, context_tokens, cache_type, parallel, guesses != "off", adapt, pictures)
    else:
        if device.type == "cpu":
            stepper, note = _on_processor(hf, context_tokens, parallel, guesses != "off", adapt)
        else:
            stepper, note = _plain(hf, "", adapt)
    if isinstance(stepper, TransformersStepper):
        stepper.require_a_forward()
    if cache_type != "fp16" and stepper.kernel != "cuda":
        width = "32-bit" if getattr(hf, "dtype", None) == torch.float32 else "16-bit"
        kept = f"The conversation is kept in {width} numbers: the cache type {cache_type} is for our own step on a GPU."
        note = f"{note} {kept}".strip()
    return stepper, note


def _plain(hf: Any, note: str, adapt: Callable[[], object] | None) -> tuple[Stepper, str]:
    if adapt is not None:
        adapt()
    return TransformersStepper(hf), note


def _on_gpu(
    hf: Any,
    context_tokens: int,
    cache_type: str,
    parallel: int,
    guesses: bool,
    adapt: Callable[[], object] | None,
    pictures: bool,
) -> tuple[Stepper, str]:
    from .cuda.cuda_stepper import CudaStepper
    from .cuda.replaced_layers import replace_layers

    try:
        parts = parts_for_gpu(hf)
        if adapt is not None:
            raise Unsuited(_ADAPTED)
        if pictures:  # the step takes over the packed layers
            raise Unsuited("it sees pictures, which its own forward reads")
        if parts is None:
            raise Unsuited("this architecture, or its place on several devices, has no step of its own")
        return CudaStepper(parts, context_tokens, parallel=parallel, cache_type=cache_type, guesses=guesses), ""
    except (Unsuited, GptqWebuiError) as error:
        why = str(error)
    log.info("the whole step is not used: %s", why)
    try:
        replaced, left = replace_layers(hf, merge=adapt is None)
    except GptqWebuiError as error:
        return _plain(hf, f"Computed in plain PyTorch, slowly: {error}", adapt)
    if not replaced:
        return _plain(hf, f"Computed in plain PyTorch, slowly: {why}." if left else "", adapt)
    rest = f"; {left} of {replaced + left} layers in plain PyTorch" if left else ""
    if adapt is not None:
        adapt()
    stepper, graph = _with_graph(hf, context_tokens, parallel)
    return stepper, f"Computed layer by layer, not in one step: {why}{rest}.{graph}"


def _with_graph(hf: Any, context_tokens: int, parallel: int) -> tuple[Stepper, str]:
    """transformers' forward recorded as a CUDA graph, or without one if it cannot be; what to say of that."""
    from .cuda.fused_forward import FusedForward
    from .cuda.graphs import GraphRecorder
    from .cuda.prompt_attention import PromptAttention
    from .cuda.rows_of_layers import RowKernels
    from .graph_answers import ManyGraphStepper

    device = hf.get_input_embeddings().weight.device
    if any(each.device != device for each in hf.parameters()):
        return TransformersStepper(hf), ""
    if any(isinstance(each, PackedExperts) for each in hf.modules()):  # they ask the host which experts are chosen
        return TransformersStepper(hf), " Experts of several orders are chosen by the processor, so every token waits for it."
    try:
        fused = FusedForward(hf, device)
    except GptqWebuiError as error:
        log.info("the graph has transformers' own operations only: %s", error)
        fused = None
    prompts = TransformersStepper(hf)
    prompts.require_a_forward()
    try:
        prompts.use(PromptAttention(hf, device))
    except GptqWebuiError as error:
        log.info("prompts are read by transformers' own operations only: %s", error)
    stepper = ManyGraphStepper(hf, context_tokens, GraphRecorder(device), fused, prompts)
    stepper.trial()
    if not stepper.why:
        if fused is not None:
            kernels = RowKernels(hf, fused.attention, fused.gpu).recording
            stepper.share(fused.gpu, GraphRecorder(device), parallel, _free_bytes(device), kernels)
        return stepper, ""
    log.info("no CUDA graph: %s", stepper.why)
    return stepper.without_graph(), " It could not be recorded as a CUDA graph, so every token waits for the processor."


def _free_bytes(device: torch.device) -> int:
    from .cuda.gpu_kernels import free_bytes

    return free_bytes(device) if device.type == "cuda" else 0


def preparing(device: torch.device) -> str:
    """What `stepper_for` is about to do on this device, in a user's words."""
    if device.type == "cpu" and numba_compiler.available() and not numba_compiler.is_cached():
        return "Compiling for this processor: about ten seconds, the first time only"
    return "Preparing the fastest way to compute"


def _on_processor(
    hf: Any, context_tokens: int, parallel: int, guesses: bool, adapt: Callable[[], object] | None
) -> tuple[Stepper, str]:
    if not numba_compiler.available():
        hold_dense(hf)
        return _plain(hf, "Answers would come faster with numba: pip install numba, then press Reload.", adapt)
    try:
        from .cpu.cpu_linear import replace_layers
        from .cpu.cpu_step import CpuStepper
        from .cpu.kernel_trial import compiles

        compiles()
    except Exception:
        log.exception("compiling for this processor failed")
        hold_dense(hf)
        return _plain(hf, "The fast way to compute could not be compiled on this machine; answers take longer.", adapt)
    try:
        parts = parts_of(hf)
        if adapt is not None:
            raise Unsuited(_ADAPTED)
        if parts is None:
            raise Unsuited("this architecture has no step of its own")
        return CpuStepper(parts, context_tokens, torch.get_num_threads(), parallel, guesses), ""
    except Unsuited as error:
        why = str(error)
    log.info("the compiled step for processors is not used: %s", why)
    replace_layers(hf, torch.get_num_threads())
    return _plain(hf, f"Computed layer by layer, not in one step: {why}." if adapt is not None else "", adapt)
