"""The advice before a download, the figures before a load and the load itself: one formula, one room."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from gptq_webui.core.models import LocalModel
from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.engine import advice, available_memory
from gptq_webui.loaders.exllamav2 import exllamav2_loader
from gptq_webui.loaders.exllamav2.exllamav2_loader import ExLlamaV2Loader, ExLlamaV2Options
from gptq_webui.loaders.machine import memory_fit
from gptq_webui.loaders.machine.capabilities import Machine
from gptq_webui.loaders.machine.memory_fit import Memory
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader
from gptq_webui.loaders.transformers.transformers_options import TransformersOptions, placement

GB = 10**9
MISTRAL = '{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}'
LITE = (  # DeepSeek V2 Lite
    '{"num_hidden_layers": 27, "num_attention_heads": 16, "hidden_size": 2048, "kv_lora_rank": 512, "qk_nope_head_dim": 128, '
    '"qk_rope_head_dim": 64, "v_head_dim": 128}'
)
CUDA = Machine({"torch": "2.13", "transformers": "5.0", "accelerate": "1"}, torch_for="cuda 13.0", gpu=True)
EXLLAMA = Machine({"torch": "2.13", "exllamav2": "0.3.2", "exllamav2_ext": "0"}, torch_for="cuda 13.0", gpu=True)
SIZES = (1_900_000_000, 4_160_000_000, 4_570_000_000, 7_680_000_000, 13_000_000_000)
FREE = (2.5, 4, 5.5, 6, 6.1, 6.3, 8, 10, 12, 16, 24)
CONTEXTS = (0, 2048, 4096, 16384)


def model_of(folder, size, kind="gptq"):
    (folder / "config.json").write_text(MISTRAL)
    quantize = QuantizeConfig(4, 128, desc_act=True) if kind == "gptq" else None
    return LocalModel(folder, kind, quantize, size, 32768, "MistralForCausalLM", (folder / "model.safetensors",))


@pytest.fixture
def gpu(monkeypatch):
    """torch, as if one card had this much free."""

    def with_free(free):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(memory_fit, "available_bytes", lambda _device: free)
        monkeypatch.setattr(memory_fit, "available_ram_bytes", lambda: 64 * GB)
        return Memory(64 * GB, free)

    return with_free


@pytest.mark.parametrize("dtype", ["auto", "fp32"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_what_the_advice_says_of_a_gpu_is_what_transformers_does(context, dtype, tmp_path, gpu):
    loader = TransformersLoader(lambda: CUDA)
    options = TransformersOptions(context_tokens=context, dtype=dtype)
    torch_dtype = torch.float32 if dtype == "fp32" else torch.float16
    seen = set()
    for size, free in itertools.product(SIZES, FREE):
        memory = gpu(int(free * GB))
        model = model_of(tmp_path, size)
        fit = loader.fit(model, options, memory)
        device = torch.device("cuda", 0)
        device_map, _limits = placement(model, options, device, torch_dtype)
        assert (device_map == {"": device}) == fit.fits, (size, free)
        if fit.fits:
            demand = options.demand(model, True)
            assert memory_fit.fit_context(model, demand, memory.gpu - size)[0] == fit.context_tokens, (size, free)
        if context and dtype == "auto":  # the advice counts with a context that was chosen
            advised = advice.fit(model, [loader], context, memory)
            assert (advised.state, advised.needs_bytes) == (fit.state, fit.needs_bytes), (size, free)
        seen.add(fit.state)
    assert seen >= {"fits", "partly"}


def test_copies_for_latent_vectors_are_in_the_advice_and_in_the_load(tmp_path, gpu, monkeypatch):
    loader = TransformersLoader(lambda: CUDA)
    model = model_of(tmp_path, 9 * GB)
    (tmp_path / "config.json").write_text(LITE)
    monkeypatch.setattr(memory_fit, "_keeps_latent", lambda: True)
    seen = set()
    for free in (10.3, 10.35, 10.4, 10.42, 10.5, 10.6, 10.7, 12):
        memory = gpu(int(free * GB))
        options = TransformersOptions()
        fit = loader.fit(model, options, memory)
        assert fit.matrices_bytes == 27 * 16 * 256 * 512 * 2
        device_map, _limits = placement(model, options, torch.device("cuda", 0), torch.float16)
        assert (device_map == {"": torch.device("cuda", 0)}) == fit.fits, free
        if fit.fits:
            demand = options.demand(model, True)
            assert memory_fit.fit_context(model, demand, memory.gpu - model.size_bytes)[0] == fit.context_tokens, free
        seen.add((fit.state, fit.context_tokens < fit.wanted_tokens))
    assert seen >= {("fits", False), ("fits", True), ("partly", False)}
    for options in (TransformersOptions(dtype="fp32"), TransformersOptions(device="cpu"), TransformersOptions(kernel="optimum")):
        assert loader.fit(model, options, gpu(24 * GB)).matrices_bytes == 0, options
    plain = model_of(tmp_path, 9 * GB, "plain")
    (tmp_path / "config.json").write_text(LITE)
    assert loader.fit(plain, TransformersOptions(), gpu(24 * GB)).matrices_bytes == 0


@pytest.mark.parametrize("cache", ["FP16", "Q8", "Q4"])
def test_what_the_advice_says_of_a_gpu_is_what_exllamav2_does(cache, tmp_path, gpu):
    loader = ExLlamaV2Loader(lambda: EXLLAMA)
    for size, free, context in itertools.product(SIZES, FREE, CONTEXTS):
        memory = gpu(int(free * GB))
        model = model_of(tmp_path, size)
        options = ExLlamaV2Options(context_tokens=context, cache_type=cache)
        fit = loader.fit(model, options, memory)
        if fit.fits:
            assert exllamav2_loader._context(model, options)[0] == fit.context_tokens, (size, free, context)
        if context and cache == "FP16":
            advised = advice.fit(model, [loader], context, memory)
            assert (advised.loader, advised.state) == ("exllamav2", fit.state)


@pytest.mark.parametrize("kind", ["gptq", "plain"])
def test_on_the_processor_advice_and_load_count_32_bit_numbers(kind, tmp_path):
    model = model_of(tmp_path, 4 * GB, kind)
    loader = TransformersLoader(lambda: Machine({"torch": "2", "transformers": "5", "accelerate": "1"}, torch_for="cpu"))
    for free in (5, 6, 7, 8, 10, 12):
        memory = Memory(free * GB)
        fit = loader.fit(model, TransformersOptions(context_tokens=4096), memory)
        assert fit.conversation_bytes == 4096 * 2 * 32 * 8 * 128 * 4
        assert fit.weights_bytes == (8 if kind == "plain" else 4) * GB
        assert advice.fit(model, [loader], 4096, memory).state == fit.state
        demand = TransformersOptions().demand(model, False)
        if (free_form := loader.fit(model, TransformersOptions(), memory)).fits:
            assert memory_fit.fit_context(model, demand, memory.ram - free_form.weights_bytes)[0] == free_form.context_tokens


def test_a_stretched_rope_is_counted_before_the_load_as_in_it(tmp_path):
    model = model_of(tmp_path, 4 * GB)
    for loader, options in (
        (TransformersLoader(), TransformersOptions(alpha_value=2, context_tokens=50_000)),
        (ExLlamaV2Loader(), ExLlamaV2Options(alpha_value=2, max_seq_len=50_000)),
    ):
        assert loader.fit(model, options, Memory(64 * GB, 64 * GB)).context_tokens == 50_000
    unstretched = TransformersLoader().fit(model, TransformersOptions(context_tokens=50_000), Memory(64 * GB))
    assert unstretched.context_tokens == 32768


def test_the_room_is_one_and_counts_what_torch_takes_at_its_start(monkeypatch):
    monkeypatch.setattr(available_memory, "look", lambda: CUDA)
    monkeypatch.setattr(available_memory, "available_gpu_bytes", lambda: 12 * GB)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert (
        available_memory.available_memory().gpu == 12 * GB - memory_fit.STARTING_BYTES
    )  # nvidia-smi has not seen our context yet
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * GB)
    assert (
        available_memory.available_memory().gpu == available_memory.free_bytes() == 12 * GB
    )  # what others in this process hold stays
    loaded = SimpleNamespace(is_remote=False, device="cuda:0")
    assert (
        available_memory.available_memory(loaded).gpu == available_memory.free_bytes(loaded) == 17 * GB
    )  # the model that is loaded makes way
