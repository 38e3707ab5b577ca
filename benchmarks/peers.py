"""What the benchmarks compare: this project, and the libraries that can be imported beside it.

Every peer is a function that opens a model and returns `run(ids, tokens) -> [seconds]`: when each
token of a greedy answer came, counted from the asking; the first is the time to first token.
"""

import contextlib
import importlib.util
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gptq_webui.core.chat import Step
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.prefix_cache import PrefixCache

Run = Callable[[Sequence[int], int], list[float]]
CONTEXT = 2048


@dataclass
class Peer:
    name: str
    versions: str
    open: Callable[[], Run]  # raises if it cannot


def versions_of(*packages: str) -> str:
    found = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def ours(model: LocalModel, device: str, plain: bool = False, context: int = CONTEXT) -> Run:
    from gptq_webui.gptq import checkpoint
    from gptq_webui.gptq.stepper_choice import stepper_for
    from gptq_webui.gptq.transformers_stepper import TransformersStepper

    dtype = torch.float32 if device == "cpu" else torch.float16
    hf, _notes = checkpoint.load(model, dtype=dtype, device_map={"": torch.device(device)})
    stepper = TransformersStepper(hf) if plain else stepper_for(hf, context)[0]

    def run(ids: Sequence[int], tokens: int) -> list[float]:
        params = GenerationParams(temperature=0, repetition_penalty=1, max_new_tokens=tokens)
        began, came = time.perf_counter(), []
        for event in generate(stepper, ids, params, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=context):
            if isinstance(event, Step):
                came.append(time.perf_counter() - began)
        return came

    run.stepper = stepper  # type: ignore[attr-defined]
    return run


def transformers_gptqmodel(model: LocalModel, device: str, dtype: torch.dtype, backend: str = "auto") -> Run:
    """transformers' own `generate` on gptqmodel's layers."""
    import gptqmodel  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig, StoppingCriteriaList

    q = model.quantize
    assert q is not None
    config = AutoConfig.from_pretrained(model.folder)
    config.quantization_config = GPTQConfig(
        bits=q.bits, group_size=q.group_size, desc_act=q.desc_act, sym=q.sym, backend=backend
    ).to_dict()
    config.transformers_weights = model.weights[0].name
    hf = AutoModelForCausalLM.from_pretrained(model.folder, config=config, dtype=dtype, device_map={"": device})

    def run(ids: Sequence[int], tokens: int) -> list[float]:
        began, came = time.perf_counter(), []

        def stop(seen: Any, scores: Any, **_: Any) -> Any:
            came.append(time.perf_counter() - began)
            return torch.zeros(seen.shape[0], dtype=torch.bool, device=seen.device)

        inputs = torch.tensor([list(ids)], device=device)
        hf.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, repetition_penalty=1.0, stopping_criteria=StoppingCriteriaList([stop]),
        )  # fmt: skip
        return came

    return run


def llama_cpp_python(gguf: Path, threads: int, context: int = CONTEXT) -> Run:
    from llama_cpp import Llama

    with contextlib.redirect_stderr(io.StringIO()):
        llama = Llama(str(gguf), n_ctx=context, n_threads=threads, verbose=False)

    def run(ids: Sequence[int], tokens: int) -> list[float]:
        llama.reset()
        began, came = time.perf_counter(), []
        for _token in llama.generate(list(ids), temp=0.0, repeat_penalty=1.0):
            came.append(time.perf_counter() - began)
            if len(came) == tokens:
                break
        return came

    return run


def xllamacpp(gguf: Path, threads: int, context: int = CONTEXT) -> Run:
    """llama.cpp's own server code in this process, by its own clock."""
    import xllamacpp as x

    params = x.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.cache_prompt, params.verbosity = context, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    server = x.Server(params)

    def run(ids: Sequence[int], tokens: int) -> list[float]:
        asked = {
            "prompt": list(ids), "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
            "samplers": ["temperature"], "repeat_penalty": 1.0,
        }  # fmt: skip
        found = server.handle_completions(asked)
        found = json.loads(found) if isinstance(found, str) else found
        times = found["timings"]
        first = times["prompt_ms"] / 1000
        return [first + at * times["predicted_per_token_ms"] / 1000 for at in range(times["predicted_n"])]

    return run


def peers_for(model: LocalModel, device: str, gguf: Path | None, context: int = CONTEXT) -> list[Peer]:
    """Ours first, then what can be imported."""
    installed = lambda name: importlib.util.find_spec(name) is not None  # noqa: E731
    own = versions_of("torch", "transformers", "numba")
    found = [
        Peer("gptq-webui", own, lambda: ours(model, device, context=context)),
        Peer("gptq-webui, plain PyTorch", own, lambda: ours(model, device, plain=True, context=context)),
    ]
    if installed("gptqmodel") and installed("optimum"):
        names = versions_of("transformers", "optimum", "gptqmodel")
        bits = model.quantize.bits if model.quantize else 0
        types = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16,)
        backends = {"cpu": ("gptq_torch_int8",) if bits == 8 else ("auto",)}.get(device, ("auto",))
        for dtype in types:
            for backend in backends:
                label = f"transformers + gptqmodel ({backend}, {str(dtype).removeprefix('torch.')})"
                found.append(Peer(label, names, partial(transformers_gptqmodel, model, device, dtype, backend)))
    if gguf is not None and device == "cpu":
        threads = torch.get_num_threads()
        if installed("llama_cpp"):
            found.append(Peer("llama.cpp", versions_of("llama-cpp-python"), lambda: llama_cpp_python(gguf, threads, context)))
        if installed("xllamacpp"):
            found.append(Peer("llama.cpp", versions_of("xllamacpp"), lambda: xllamacpp(gguf, threads, context)))
    return found
