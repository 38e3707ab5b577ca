"""loaders/machine/memory_fit.py and loaders/machine/gpus.py: what is needed, what is free, and in which words."""

import json
import subprocess

import pytest

from gptq_webui.core.errors import AnswerFailed, LoadFailed, NotEnoughMemory
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.machine import gpus, memory_fit

GB = 10**9
MISTRAL = '{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}'
PER_TOKEN = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, numbers of a head, bytes: 131072


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(MISTRAL)
    return LocalModel(tmp_path, "gptq", None, 4_160_000_000, 32768, "MistralForCausalLM")


def test_what_is_needed_is_weights_conversation_and_overhead(model):
    found = memory_fit.estimate(model, memory_fit.Demand(4096), free_bytes=12 * GB, device=memory_fit.GPU)
    assert found.needs_bytes == model.size_bytes + 4096 * PER_TOKEN + memory_fit.COMPUTING_BYTES
    assert found.fits and not found.impossible and found.context_tokens == 4096
    assert str(found) == (
        "Needs 5.00 GB: 4.16 GB of weights, 536.9 MB for 4096 tokens of conversation, 300.0 MB for computing. "
        "12.00 GB are free on the GPU, of which 1.00 GB are kept for other programs. It fits."
    )


def test_one_gigabyte_stays_free_so_the_context_gives_way_and_the_figure_is_shown(model):
    needed = model.size_bytes + 8192 * PER_TOKEN + memory_fit.COMPUTING_BYTES + GB
    assert memory_fit.estimate(model, memory_fit.Demand(), free_bytes=needed, device=memory_fit.GPU).context_tokens == 8192
    found = memory_fit.estimate(model, memory_fit.Demand(), free_bytes=needed - 256 * PER_TOKEN, device=memory_fit.GPU)
    assert found.context_tokens == 7936 and found.fits and "shortened from 8192 to 7936 tokens" in str(found)


def test_a_context_that_the_user_fixed_is_not_shortened(model):
    found = memory_fit.estimate(model, memory_fit.Demand(8192), free_bytes=6 * GB, device=memory_fit.GPU, spare_bytes=16 * GB)
    assert found.context_tokens == 8192 and not found.fits and "A part goes to the processor" in str(found)


def test_an_eight_bit_cache_takes_half(model):
    full = memory_fit.estimate(model, memory_fit.Demand(8192), free_bytes=12 * GB, device=memory_fit.GPU)
    half = memory_fit.estimate(model, memory_fit.Demand(8192, number_bytes=1), free_bytes=12 * GB, device=memory_fit.GPU)
    assert half.conversation_bytes * 2 == full.conversation_bytes


def test_what_fits_nowhere_is_impossible_and_says_so(model):
    found = memory_fit.estimate(model, memory_fit.Demand(), free_bytes=2 * GB, device=memory_fit.GPU, spare_bytes=2 * GB)
    assert found.impossible and "does not fit. Choose a smaller branch" in str(found)


@pytest.mark.parametrize(
    ("free", "asked", "whole"),
    [(12 * GB, 0, True), (6_200_000_000, 0, True), (6_200_000_000, 8192, False), (5 * GB, 0, False)],
)
def test_the_context_is_shortened_before_weights_leave_the_gpu(model, free, asked, whole):
    room = memory_fit.room_for_weights(model, memory_fit.Demand(asked), free)
    assert (model.size_bytes <= room) == whole
    if whole:  # and what is left is still a useful conversation beside 1 GB
        left = free - model.size_bytes - memory_fit.KEPT_FREE_BYTES - memory_fit.COMPUTING_BYTES
        assert left >= memory_fit.USEFUL_CONTEXT_TOKENS * PER_TOKEN


class OutOfMemoryError(RuntimeError):
    pass


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (NotEnoughMemory("x"), True),
        (OutOfMemoryError("x"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (chained(AnswerFailed("There was a problem."), OutOfMemoryError("x")), True),
        (LoadFailed("The file is damaged."), False),
        (None, False),
    ],
)
def test_lack_of_memory_is_recognised_in_every_back_ends_words(error, memory):
    assert memory_fit.is_out_of_memory(error) == memory


def test_the_driver_is_asked_for_every_gpu():
    text = "NVIDIA GeForce RTX 3060, 12288, 11020, 580.65.06, 8.6, GPU-1\nNVIDIA Tesla, [N/A], [N/A], 580.65.06, 7.5, GPU-2\n"
    assert gpus.read_answer(text) == [
        gpus.GpuInfo("NVIDIA GeForce RTX 3060", 12288 << 20, 11020 << 20, "580.65.06", "8.6", "GPU-1")
    ]


@pytest.mark.parametrize("answer", [OSError("gone"), subprocess.TimeoutExpired("nvidia-smi", 5)])
def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch, answer):
    def run(*_args, **_kwargs):
        raise answer

    monkeypatch.setattr(gpus.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(gpus.subprocess, "run", run)
    assert gpus.gpus() == []


def test_a_byte_order_mark_changes_no_figure(tmp_path):
    """Notepad writes one; the same config without it says how large a conversation is."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    text = json.dumps(config)
    sizes = []
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "config.json").write_text(text, encoding=encoding)
        sizes.append(memory_fit.conversation_bytes_per_token(tmp_path))
    assert sizes == [512, 512]


LITE = {
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("transformers", "numba", "on_gpu", "number_bytes", "wanted"),
    [
        ("5.15.0", None, True, 2, 576 * 2),
        ("5.24.0.dev0", "0.68", False, 4, 576 * 4),
        ("5.24.0", "0.68", False, 2, 1088 * 2),  # our step has the vector twice
        ("4.57.6", "0.68", False, 4, 576 * 4),
        ("4.57.6", "0.68", True, 2, 16 * 320 * 2),  # each head's key and value
        ("5.14.1", None, False, 4, 16 * 320 * 4),
    ],
)
def test_of_a_latent_vector_is_counted_what_is_kept(transformers, numba, on_gpu, number_bytes, wanted, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LITE))
    monkeypatch.setattr(memory_fit, "version_of", {"transformers": transformers, "numba": numba}.get)
    assert memory_fit.conversation_bytes_per_token(tmp_path, number_bytes, on_gpu) == 27 * wanted


def test_the_copies_that_attention_to_a_latent_vector_reads_are_counted_on_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(LITE))
    model = LocalModel(tmp_path, "gptq", None, 9 * GB, 32768, "DeepseekV2ForCausalLM")
    monkeypatch.setattr(memory_fit, "version_of", {"transformers": "5.15.0"}.get)
    copies = 27 * 16 * (128 + 128) * 512 * 2
    plain, counted = (memory_fit.Demand(4096, latent_kernels=each) for each in (False, True))
    needed = [memory_fit.estimate(model, each, free_bytes=24 * GB, device=memory_fit.GPU) for each in (plain, counted)]
    assert needed[1].needs_bytes == needed[0].needs_bytes + copies and needed[1].matrices_bytes == copies == 113_246_208
    assert "9.00 GB of weights, 113.2 MB for copies that attention reads, " in str(needed[1])
    rooms = [memory_fit.room_for_weights(model, each, 12 * GB) for each in (plain, counted)]
    assert rooms[0] - rooms[1] == copies
    free = memory_fit.KEPT_FREE_BYTES + memory_fit.COMPUTING_BYTES + 1024 * 27 * 576 * 2 + copies
    asked = memory_fit.Demand(latent_kernels=True)
    assert memory_fit.fit_context(model, asked, free)[0] == 1024
    assert memory_fit.fit_context(model, asked, free - 1)[0] == 768
    monkeypatch.setattr(memory_fit, "version_of", {"transformers": "5.14.1"}.get)
    assert memory_fit.matrices_bytes(tmp_path, asked) == 0, "it keeps keys and values, which those kernels do not read"
    (tmp_path / "config.json").write_text(MISTRAL)
    assert memory_fit.matrices_bytes(tmp_path, asked) == 0


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_as_many_copies_are_counted_as_attention_to_a_latent_vector_makes(kind, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from every_architecture import tiny_model

    from gptq_webui.gptq.cuda.latent_attention import LatentAttention, is_latent

    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such models")
    model = tiny_model(kind)
    model.config.save_pretrained(tmp_path)
    attention = LatentAttention(None)
    made = [attention._matrix(each) for each in model.modules() if is_latent(each)]
    monkeypatch.setattr(memory_fit, "_keeps_latent", lambda: True)
    counted = memory_fit.matrices_bytes(tmp_path, memory_fit.Demand(latent_kernels=True))
    assert counted == sum(each.nbytes for each in made) > 0


@pytest.mark.parametrize("step", [True, False])
@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_what_is_counted_of_a_latent_vector_is_what_a_conversation_takes(kind, step, tmp_path):
    """As transformers keeps it, and as our step on a processor does."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from every_architecture import tiny_model

    from gptq_webui.gptq.families.known import parts_of
    from gptq_webui.gptq.transformers_stepper import TransformersStepper

    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip("this transformers has no such models")
    model = tiny_model(kind)
    model.config.save_pretrained(tmp_path)
    if step:
        pytest.importorskip("numba")
        from test_families import packed

        from gptq_webui.gptq.cpu.cpu_step import CpuStepper

        stepper = CpuStepper(parts_of(packed(kind)[0]), 256, 2)
    else:
        stepper = TransformersStepper(model)
        if memory_fit.version_of("numba") and not memory_fit._keeps_latent():
            pytest.skip("this transformers keeps more than our step, which is counted")
    memory = stepper.begin()
    with torch.inference_mode():
        stepper.prefill(memory, [5] * 256)
    each = memory.size_bytes / 256
    counted = memory_fit.conversation_bytes_per_token(tmp_path, 4, on_gpu=False)
    assert each <= counted <= 1.25 * each
    stepper.close()
