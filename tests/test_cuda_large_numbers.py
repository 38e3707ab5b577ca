"""gptq/cuda: models of bfloat16 have numbers that fp16 does not hold, and products take them. On a GPU, and emulated."""

from contextlib import nullcontext

import emulated_gpu
import pytest
import torch
from every_architecture import tiny_model
from test_cuda_every_architecture import NEW

from gptq_webui.gptq import stepper_choice
from gptq_webui.gptq.cuda import activations
from gptq_webui.gptq.cuda.cuda_linear import linear_of, several_rows
from gptq_webui.gptq.cuda.cuda_weights import packing_of
from gptq_webui.gptq.cuda.gpu_kernels import Gpu
from gptq_webui.gptq.cuda.kernel_source import LayerVariant
from gptq_webui.gptq.gptq_linear import GPTQLinear

POWERS = (20, 0, -40, 40, -90)  # of two, by which rows are multiplied
LIMIT = 8e-3


@pytest.fixture(params=["a GPU", "emulated"])
def gpu(request, monkeypatch):
    if request.param == "emulated":
        emulated_gpu.emulate(monkeypatch)
        return emulated_gpu.Gpu(torch.device("cpu"))
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    found = Gpu(torch.device("cuda", 0))
    request.addfinalizer(found.close)
    return found


def packed(device, k, n, bits=4, group_size=32, act_order=False, bias=False):
    made = GPTQLinear(k, n, bits, group_size, bias=bias, device=device)
    made.qweight.data.random_(-(2**31), 2**31 - 1)
    if bits in (4, 8):
        made.qzeros.data.fill_({4: 0x77777777, 8: 0x7F7F7F7F}[bits])  # symmetric, which is emulated
    else:
        made.qzeros.data.random_(-(2**31), 2**31 - 1)
    made.scales.data.uniform_(0.5, 1.5).mul_(2 / 2**bits / k**0.5)
    if act_order:
        made.g_idx.data = made.g_idx.data[torch.randperm(k, device=device)]
    if bias:
        made.bias.data.normal_()
    made.prepare()
    return made


def rows_of(count, k, device):
    """bf16 [count, k], each row of numbers of another size; the first is beyond fp16."""
    powers = torch.tensor([POWERS[at % len(POWERS)] for at in range(count)], device=device)
    return torch.ldexp(torch.randn(count, k, device=device), powers[:, None]).bfloat16()


def same(found, wanted):
    apart = (found.double() - wanted.double()).norm(dim=-1) / wanted.double().norm(dim=-1).clamp(min=1e-36)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    assert float(apart.nan_to_num(nan=torch.inf).max()) < LIMIT


def ready(gpu, layers, *rest):
    packing = packing_of(layers)
    gpu.add_missing(packings=[packing], variants=[LayerVariant(False), LayerVariant(True)])
    linear = linear_of(gpu, layers, packing, torch.bfloat16, *rest)
    gpu.add_missing(variants=[linear.variant])
    return linear


@NEW
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("k", "n", "bits", "group_size", "act_order"),
    [
        (256, 96, 4, 32, True), (3072, 6680, 4, 128, False), (608, 72, 3, 32, False), (320, 200, 8, 32, True),
        (512, 136, 8, 64, False), (256, 64, 4, 16, True),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_rows_of_any_size_are_multiplied(gpu, k, n, bits, group_size, act_order, bias):
    if bits == 3 and gpu.name == "no GPU":
        pytest.skip("only 4 and 8 bits are emulated")
    torch.manual_seed(k + n)
    layer = packed(gpu.device, k, n, bits, group_size, act_order, bias)
    x = rows_of(40, k, gpu.device)
    wanted = layer(x.float())
    linear = ready(gpu, [layer])
    assert float(wanted.abs().max()) > 1e10
    for at in range(len(POWERS)):
        same(linear(x[at : at + 1]), wanted[at : at + 1])
    for several in (False, True):
        for count in (2, 5, 16, 40):
            with several_rows([linear]) if several else nullcontext():
                same(linear(x[:count]), wanted[:count])
    same(linear(x.float()[:5]).bfloat16(), wanted[:5])  # of numbers that no kernel takes


@NEW
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@torch.inference_mode()
def test_gates_and_activations_are_of_what_rows_were(gpu, gated, bias):
    torch.manual_seed(3)
    layers = [packed(gpu.device, 256, 200, bias=bias) for _ in range(1 + gated)]
    x = rows_of(20, 256, gpu.device)
    wanted = activations.apply(0, layers[0](x.float()))
    if gated:
        wanted = wanted * layers[1](x.float())
    linear = ready(gpu, layers, *((0, None) if gated else (None, 0)))
    for at in range(len(POWERS)):
        same(linear(x[at : at + 1]), wanted[at : at + 1])
    for several in (False, True):
        with several_rows([linear]) if several else nullcontext():
            same(linear(x), wanted)


@NEW
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_row_of_zeros_is_its_bias_and_what_is_no_number_stays_none(gpu, bias):
    torch.manual_seed(4)
    layer = packed(gpu.device, 256, 96, bias=bias)
    x = rows_of(6, 256, gpu.device)
    x[1], x[3, 7] = 0, float("nan")
    wanted = layer(x.float())
    linear = ready(gpu, [layer])
    for several in (False, True):
        with several_rows([linear]) if several else nullcontext():
            found = linear(x)
            assert found[3].isnan().all()
            for rows in (slice(0, 1), slice(2, 3), slice(4, 6), *((slice(1, 2),) if bias else ())):
                same(found[rows], wanted[rows])
            assert bias or not found[1].any()


@NEW
@torch.inference_mode()
def test_small_numbers_beside_a_large_one_keep_their_bits(gpu):
    """A large number that a weight of zero multiplies takes nothing from the others."""
    torch.manual_seed(5)
    layer = packed(gpu.device, 1024, 96)
    layer.qweight.data[0] = layer.qweight.data[0] & ~0xF | 8  # weights of the first input, all of them the zero
    x = (torch.randn(5, 1024, device=gpu.device) * 0.05).bfloat16()
    x[:, 0] = 60_000
    wanted = layer(x.float())
    assert float(wanted.abs().max()) < 10
    linear = ready(gpu, [layer])
    for several in (False, True):
        with several_rows([linear]) if several else nullcontext():
            same(linear(x), wanted)


@NEW
@torch.inference_mode()
def test_a_model_whose_inner_numbers_leave_fp16_is_computed(monkeypatch):
    """Prompts were no numbers, and single tokens cut off at the largest number of fp16."""
    torch.manual_seed(1)
    hf = tiny_model("gemma2", wide=True).eval()
    inner, hidden = hf.config.intermediate_size, hf.config.hidden_size
    for layer in hf.model.layers:
        for name, size in (("gate_proj", 500.0), ("up_proj", 500.0), ("down_proj", 1 / 250_000)):
            made = packed("cpu", *((inner, hidden) if name == "down_proj" else (hidden, inner)))
            made.scales.data.mul_(size)
            setattr(layer.mlp, name, made)
    found = []
    hf.model.layers[0].mlp.down_proj.register_forward_hook(lambda _module, given, _out: found.append(float(given[0].abs().max())))
    ids = torch.randint(3, 90, (12,)).tolist()
    wanted = hf(input_ids=torch.tensor([ids])).logits[0].double()
    assert found[0] > 5e5
    hf.bfloat16()
    plain = hf(input_ids=torch.tensor([ids])).logits[0].double()
    emulated_gpu.emulate(monkeypatch)
    stepper, _note = stepper_choice.stepper_for(hf, 64)
    assert stepper.kernel == "graph"
    memory = stepper.begin()
    rows = [stepper.prefill(memory, ids[:9])[0].double().clone()]
    rows += [stepper.step(memory, id)[0].double().clone() for id in ids[9:]]
    apart = [float((row - wanted[8 + at]).norm() / wanted[8 + at].norm()) for at, row in enumerate(rows)]
    rounding = float((plain - wanted).norm() / wanted.norm())
    assert max(apart) < 2 * rounding + 1e-2
