"""gptq/cpu: every kernel against float64, whole models against transformers on dequantised weights."""

import threading
import tracemalloc

import numpy as np
import pytest
import torch

import tiny

pytest.importorskip("numba")

from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq import checkpoint, stepper_choice
from gptq_webui.gptq.cpu import cpu_kernels, cpu_weights, numba_compiler, tiles, weight_room
from gptq_webui.gptq.cpu.cpu_linear import CpuLinear
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.cpu.thread_team import Team
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.prefix_cache import PrefixCache
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.gptq.transformers_stepper import TransformersStepper


@pytest.fixture(scope="module")
def team():
    team = Team(3)
    yield team
    team.close()


def packed(rows, cols, bits, group_size, bias=False, seed=0, **kwargs):
    """(GPTQLinear, its dense weight fp64 [N, K])."""
    generator = torch.Generator().manual_seed(seed)
    linear = GPTQLinear(rows, cols, bits, group_size, checkpoint_format=kwargs.get("form", "gptq"), bias=bias)
    tensors, dense = tiny.random_layer(rows, cols, bits, group_size, generator=generator, **kwargs)
    if bias:
        tensors["bias"] = torch.randn(cols, generator=generator).half()
    linear.load_state_dict(tensors)
    return linear, dense.double()


def error(found, wanted):
    """Largest error against the spread of the results."""
    return float((found.double() - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "cols", "group", "order"),
    [
        (64, 32, 32, True),
        (96, 160, -1, False),
        (320, 96, 64, True),
        (416, 32, 128, False),  # the last group is short
        (1056, 32, -1, True),
        (96, 32, 24, True),  # groups that no vector likes
    ],
)
def test_a_packed_product_is_that_of_float64(bits, rows, cols, group, order, team):
    for sym, form in ((True, "gptq"), (False, "gptq_v2")):
        linear, dense = packed(rows, cols, bits, group, act_order=order, sym=sym, form=form, bias=True, seed=rows)
        product = CpuLinear(cpu_weights.from_module(linear, cpu_kernels.ISA, team), team)
        for count in (1, 3, 4, 9):
            x = torch.randn(count, rows, generator=torch.Generator().manual_seed(count)) * 10 ** torch.randn(count, 1)
            wanted = x.double() @ dense.T + linear.bias.double()
            assert error(product(x), wanted) < 5e-4


def test_large_sums_do_not_run_over(team):
    linear, dense = packed(256, 32, 8, -1)
    product = CpuLinear(cpu_weights.from_module(linear, cpu_kernels.ISA, team), team)
    x = torch.full((1, 256), 7.0)  # every product as large as it can be
    x[0, ::3] = -7.0
    assert float((product(x) - x.double() @ dense.T).abs().max() / (x.double().abs() @ dense.abs().T).max()) < 1e-5
    assert not product(torch.zeros(1, 256)).any()


@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16), ("float", torch.float32)])
def test_a_dense_product_keeps_every_number(kind, dtype, team):
    size = 1e-6 if kind == "bfloat16" else 1  # smaller than a half can be
    weight = (torch.randn(50, 72, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    stored = cpu_weights.from_dense(weight.float(), torch.full((50,), 0.5) * size, cpu_kernels.ISA, team)
    assert stored.kind == {"half": cpu_weights.HALF, "bfloat16": cpu_weights.BFLOAT16, "float": cpu_weights.FLOAT}[kind]
    for count in (1, 6):
        x = torch.randn(count, 72)
        assert error(CpuLinear(stored, team)(x), x.double() @ weight.double().T + 0.5 * size) < 1e-5


def test_a_head_that_came_from_eight_bits_goes_back_to_them(team):
    torch.manual_seed(0)
    q = torch.randint(-127, 128, (64, 96))
    q[:, ::32] = 127  # each group has its largest
    scales = (torch.rand(64, 3) * 0.01 + 0.001).half().float()
    weight = (q * scales.repeat_interleave(32, 1)).half().float()
    stored = cpu_weights.from_dense(weight, None, cpu_kernels.ISA, team)
    assert stored.kind == 8 and stored.error < 1e-3
    x = torch.randn(2, 96)
    assert error(CpuLinear(stored, team)(x), x.double() @ weight.double().T) < 2e-3


def other_isas():
    return [isa for isa in ("avx2", "plain") if isa != cpu_kernels.ISA and (isa == "plain" or has("avx2"))]


def has(feature):
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_features().get(feature, False)


@pytest.mark.parametrize("isa", other_isas())
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernels_of_other_processors_give_the_same(isa, bits, team):
    from numba import njit

    linear, dense = packed(128, 32, bits, 64, sym=False, form="gptq_v2")
    w = cpu_weights.from_module(linear, isa, team)
    rows = 4
    tile = tiles.packed_tile(bits, rows, isa)
    x = torch.randn(rows, 128)
    parts = x.view(rows, 2, 64)
    scale = parts.abs().amax(-1) / tiles.X_TOP
    q = (parts / scale[..., None]).round().to(torch.int16)
    xq = weight_room.aligned((rows, 128), np.int16)
    xq[...] = q.reshape(rows, 128).numpy()
    scales, sums = scale.numpy(), q.int().sum(-1).to(torch.int32).numpy()
    y = np.full((rows, 32), np.nan, np.float32)

    @njit
    def run(w, s, z, x, xs, xz, y):
        for t in range(2):
            tile(w + t * 2 * 64 * 2 * bits, s + t * 64, z + t * 32, x, xs, xz, 2, 64, y + 64 * t, 128)

    run(*(each.ctypes.data for each in (w.w, w.scales, w.zeros, xq, scales, sums, y)))
    assert error(torch.from_numpy(y), x.double() @ dense.T) < 5e-4


def test_a_team_that_is_dropped_leaves_no_thread():
    before = threading.active_count()
    linear, dense = packed(64, 32, 4, 32)
    product = CpuLinear(cpu_weights.from_module(linear, cpu_kernels.ISA, Team(3)), Team(4))
    x = torch.randn(6, 64)
    assert error(product(x), x.double() @ dense.T) < 5e-4
    product._team.close()
    assert error(product(x), x.double() @ dense.T) < 5e-4  # and works on, alone
    del product
    for thread in threading.enumerate():
        if thread.name.startswith("gptq-webui cpu") and threading.active_count() > before:
            thread.join(0.5)
    assert threading.active_count() <= before


def test_nothing_of_a_product_stays_in_memory():
    """numba keeps the arrays that a generator is given: the counters of every token that was ever computed."""

    class Roomy(Team):
        def run(self, phases, function, *arguments):
            super().run(1000, function, *arguments)  # 128 kB of counters

    linear, _dense = packed(64, 32, 4, 32)
    team = Roomy(2)
    product, x = CpuLinear(cpu_weights.from_module(linear, cpu_kernels.ISA, team), team), torch.randn(3, 64)
    product(x)  # compiles
    tracemalloc.start()  # NumPy reports its arrays to it
    try:
        for _ in range(100):
            product(x)
        left, _most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        team.close()
    assert left < 1 << 20


def test_exp_is_exp():
    x = np.linspace(-87, 88, 5001, dtype=np.float32)
    found = np.array([cpu_kernels.exp(each) for each in x], np.float64)
    assert np.abs(found / np.exp(x.astype(np.float64)) - 1).max() < 1e-6


# --- whole models ---------------------------------------------------------------------------------


def load(folder, kind="llama", **kwargs):
    """(packed model on the CPU, its dense twin)."""
    twin = tiny.write(folder, kind, **kwargs)
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map={"": "cpu"})
    return hf, twin


def logits(stepper, ids, chunk=None):
    """[n, V], position by position; the first `chunk` in one go."""
    memory = stepper.begin()
    found = []
    with torch.inference_mode():
        start = chunk or 1
        found.append(stepper.prefill(memory, ids[:start]).clone())
        found += [stepper.step(memory, id).clone() for id in ids[start:]]
    return torch.cat(found)


IDS = torch.randint(5, 260, (45,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_step_computes_what_transformers_computes(kind, threads, tmp_path):
    hf, twin = load(tmp_path / "model", kind, bits=4 if threads == 1 else 8)
    stepper = CpuStepper(parts_of(hf), 64, threads)
    with torch.no_grad():
        wanted = twin(torch.tensor([IDS])).logits[0].double()
    for chunk in (None, 7, 33):  # mistral's window of 8 lies inside the chunk, and across it
        found = logits(stepper, IDS, chunk)
        assert error(found, wanted[-len(found) :]) < 3e-3
    stepper.close()


def test_a_model_with_joined_layers_and_part_of_each_head_turned(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "phi3", **tiny._LLAMA, partial_rotary_factor=0.5, pad_token_id=0, original_max_position_embeddings=256
    )
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    parts = parts_of(hf)
    assert parts is not None and len(parts.layers[0].qkv) == 1
    with torch.no_grad():
        wanted = hf(torch.tensor([IDS])).logits[0].double()
    stepper = CpuStepper(parts, 64, 2)
    assert error(logits(stepper, IDS), wanted) < 3e-3
    stepper.close()


def test_layers_of_one_input_may_each_have_their_own_order(tmp_path):
    hf, twin = load(tmp_path / "model", group_size=16, act_order=True)  # tiny gives every layer another order
    stepper = CpuStepper(parts_of(hf), 64, 2)
    with torch.no_grad():
        wanted = twin(torch.tensor([IDS])).logits[0].double()
    assert error(logits(stepper, IDS), wanted) < 3e-3
    stepper.close()


def test_a_memory_grows_forks_and_is_cut(tmp_path):
    hf, _twin = load(tmp_path / "model", "llama")
    stepper = CpuStepper(parts_of(hf), 600, 2)
    ids = (IDS * 12)[:500]
    wanted = logits(stepper, ids, 480)[-1]
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, ids[:300])
        other = memory.fork(40)
        stepper.prefill(memory, [9] * 20)  # more than its first room holds
        memory.cut(300)
        assert torch.equal(stepper.prefill(memory, ids[300:])[0], wanted)
        assert other.length == 40 and torch.equal(stepper.prefill(other, ids[40:])[0], wanted)
    stepper.close()


def test_the_model_gives_its_weights_away_and_works_on(tmp_path):
    hf, twin = load(tmp_path / "model")
    before = sum(each.numel() * each.element_size() for each in hf.parameters())
    stepper, note = stepper_for(hf, 64)
    assert isinstance(stepper, CpuStepper) and note == ""
    assert sum(each.numel() * each.element_size() for each in hf.parameters()) < before
    with torch.no_grad():
        found, wanted = (each(torch.tensor([IDS])).logits[0] for each in (hf, twin))
    assert error(found, wanted.double()) < 3e-3
    name, layer = next((name, each) for name, each in hf.named_modules() if isinstance(each, GPTQLinear))
    assert torch.allclose(layer.dequantize(), twin.get_submodule(name).weight, atol=1e-5)
    stepper.close()


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "mixtral"])
def test_layers_of_other_architectures_use_the_kernels_one_by_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(stepper_choice, "parts_of", lambda _hf: None)  # as if no family described it
    hf, twin = load(tmp_path / "model", kind)
    stepper, note = stepper_for(hf, 64)
    assert isinstance(stepper, TransformersStepper) and note == ""
    assert all(each.qweight.numel() == 0 for each in hf.modules() if isinstance(each, GPTQLinear))
    with torch.no_grad():
        wanted = twin(torch.tensor([IDS])).logits[0].double()
    found = logits(stepper, IDS, 40)
    assert error(found, wanted[-len(found) :]) < 3e-3


def test_machines_without_numba_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(numba_compiler, "available", lambda: False)
    stepper, note = stepper_for(tiny.dense_model("llama"), 64)
    assert isinstance(stepper, TransformersStepper) and "pip install numba" in note


def test_a_kernel_that_computes_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(CpuStepper, "step", lambda self, memory, id: torch.zeros(1, 48))
    stepper, note = stepper_for(tiny.dense_model("llama"), 64)
    assert isinstance(stepper, TransformersStepper) and "could not be compiled" in note


def test_machine_code_is_kept_outside_the_package():
    assert numba_compiler.cache_folder().is_absolute()
    assert tiny.Path(__file__).parents[1] not in numba_compiler.cache_folder().parents
    import gptq_webui.gptq.cpu.forward as forward

    assert str(numba_compiler.cache_folder(compiled_given())) in forward.forward._cache.cache_path


def compiled_given():
    import os

    return os.environ["NUMBA_CACHE_DIR"]


@pytest.mark.demo
@pytest.mark.parametrize("bits", [4, 8])
def test_the_demo_models_logits_are_those_of_its_dequantised_weights(bits, demo_root):
    folder = next(each for each in demo_root.iterdir() if f"{bits}bit" in each.name)
    hf, _notes = checkpoint.load(LocalModel.read(folder), dtype=torch.float32, device_map={"": "cpu"})
    ids = torch.randint(5, 40000, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    text = "The capital of France is Paris. " * 3
    from transformers import AutoTokenizer

    ids = (AutoTokenizer.from_pretrained(folder)(text)["input_ids"] + ids)[:500]
    with torch.inference_mode():
        wanted = hf(torch.tensor([ids])).logits[0].double()
    stepper, _note = stepper_for(hf, 512)
    assert isinstance(stepper, CpuStepper)
    found = logits(stepper, ids).double()
    assert float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 1e-2
    assert float((found.argmax(1) == wanted.argmax(1)).double().mean()) >= 0.99
    params = GenerationParams(seed=3, temperature=1.0, max_new_tokens=24)
    answers = set()
    for _ in range(20):
        events = list(
            generate(stepper, ids[:20], params, threading.Event(), prefix=PrefixCache(), end_ids=(), context_tokens=512)
        )
        answers.add(tuple(event.id for event in events[:-1]))
    assert len(answers) == 1
    stepper.close()
