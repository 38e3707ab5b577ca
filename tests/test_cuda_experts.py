"""gptq/cuda/cuda_experts.py and graph_stepper.py on a GPU: experts and whole models against plain PyTorch."""

import importlib

import pytest
import torch
from transformers import AutoConfig

import tiny
from gptq_webui.core.models import LocalModel
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.cuda.cuda_experts import MOST_CHOICES, CudaExperts
from gptq_webui.gptq.cuda.replaced_layers import replace_layers
from gptq_webui.gptq.experts import PackedExperts
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.stepper_choice import stepper_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_on_the_gpu_equal_plain_ones(sym, bits, tmp_path):
    tiny.write(tmp_path / "model", "mixtral", act_order=False, sym=sym, bits=bits)
    model, _notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float16, device_map={"": "cuda"})
    plain = [each for each in model.modules() if isinstance(each, PackedExperts)]
    if not plain:
        pytest.skip("this transformers keeps experts as a list")
    generator = torch.Generator("cuda").manual_seed(0)
    cases = []
    for tokens in (1, 7, MOST_CHOICES // 2, MOST_CHOICES):
        x = torch.randn(tokens, 64, generator=generator, device="cuda").half()
        chosen = torch.rand(tokens, 4, generator=generator, device="cuda").argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, generator=generator, device="cuda").half()
        cases.append((x, chosen, weights, plain[0](x.float(), chosen, weights.float())))
    replaced, left = replace_layers(model)
    assert replaced and not left
    experts = [each for each in model.modules() if isinstance(each, CudaExperts)]
    for x, chosen, weights, wanted in cases:
        assert error(experts[0](x, chosen, weights), wanted) < 3e-3


def random_experts(dense, bias, group=32, device="cuda", orders="natural"):
    """Packed experts on a device for a module of transformers, with random numbers.

    `orders`: of their inputs, "natural", "one" or "of each expert".
    """
    packed = PackedExperts(dense)
    hidden, inner = 128, 192
    generator = torch.Generator().manual_seed(0)
    for at in range(packed.num_experts):
        for name, rows, columns in (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)):
            if name == "gate_proj" and not packed.gated:
                continue
            seed = torch.Generator().manual_seed(rows + (at if orders == "of each expert" else 0))
            tensors, _weight = tiny.random_layer(
                rows, columns, 4, group, act_order=orders != "natural", generator=generator,
                permutation=torch.randperm(rows, generator=seed),
            )  # fmt: skip
            layer = GPTQLinear(rows, columns, 4, group, bias=bias)
            if bias:
                tensors["bias"] = torch.randn(columns, generator=generator).half()
            layer.load_state_dict(tensors | {"scales": tensors["scales"] * 2})
            packed.get_submodule(str(at)).add_module(name, layer)
    return packed.to(device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "name", "facts", "bias"),
    [
        ("gpt_oss", "GptOssExperts", {"num_local_experts": 5}, True),
        ("gpt_oss", "GptOssExperts", {"num_local_experts": 5}, False),
        ("mixtral", "MixtralExperts", {"num_local_experts": 5}, True),
        ("nemotron_h", "NemotronHExperts", {"n_routed_experts": 5, "moe_intermediate_size": 192}, True),
        ("nemotron_h", "NemotronHExperts", {"n_routed_experts": 5, "moe_intermediate_size": 192}, False),
    ],
)
def test_experts_with_a_bias_or_a_gate_of_their_own(architecture, name, facts, bias, dtype):
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    if not hasattr(module, name):
        pytest.skip("this transformers keeps experts as a list")
    config = AutoConfig.for_model(architecture, hidden_size=128, intermediate_size=192, **facts)
    model = torch.nn.Module()
    model.dtype = dtype
    model.experts = random_experts(getattr(module, name)(config), bias)
    generator = torch.Generator("cuda").manual_seed(0)
    cases = []
    for tokens in (1, 7, 100):  # few choices, and a prompt
        x = torch.randn(tokens, 128, generator=generator, device="cuda").to(dtype)
        chosen = torch.rand(tokens, 5, generator=generator, device="cuda").argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, generator=generator, device="cuda").to(dtype)
        cases.append((x, chosen, weights, model.experts(x.float(), chosen, weights.float())))
    layers = 15 if architecture != "nemotron_h" else 10  # which have no gates
    assert replace_layers(model, merge=False) == (layers, 0) and isinstance(model.experts, CudaExperts)
    assert (model.experts._clamped is not None) == (architecture == "gpt_oss")
    for x, chosen, weights, wanted in cases:
        assert error(model.experts(x, chosen, weights), wanted) < (4e-3 if dtype == torch.float16 else 8e-3)
    rows = torch.randn(5 * 3, 128, generator=generator, device="cuda").to(dtype)
    each = torch.arange(5, device="cuda").repeat_interleave(3)[:, None]
    wanted = model.experts(rows, each, torch.ones_like(each, dtype=dtype))
    assert torch.equal(model.experts(rows), wanted)


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "falcon", "phi", "gpt_neox"])
def test_a_recorded_model_continues_as_its_dense_twin(kind, tmp_path):
    twin = tiny.write(tmp_path / "model", kind, act_order=False)
    model, _notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float16, device_map={"": "cuda"})
    stepper, note = stepper_for(model, 64)
    ids = torch.randint(0, 288, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = twin(torch.tensor([ids])).logits[0].cuda()
        memory = stepper.begin()
        assert error(stepper.prefill(memory, ids[:20])[0], wanted[19]) < 1e-2
        for at in range(20, 40):
            assert error(stepper.step(memory, ids[at])[0], wanted[at]) < 1e-2
        assert memory.cut(25)
        assert error(stepper.step(memory, ids[25])[0], wanted[25]) < 1e-2
    assert stepper.kernel == "graph", note
    stepper.close()


def test_a_prompt_gives_the_same_bits_every_time():
    module = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    config = AutoConfig.for_model("mixtral", hidden_size=128, intermediate_size=192, num_local_experts=5)
    model = torch.nn.Module()
    model.dtype = torch.float16
    model.experts = random_experts(module.MixtralExperts(config), False)
    replace_layers(model, merge=False)
    generator = torch.Generator("cuda").manual_seed(0)
    for tokens in (100, 300, 2000):
        x = torch.randn(tokens, 128, generator=generator, device="cuda").half()
        chosen = (torch.rand(tokens, 5, generator=generator, device="cuda") + torch.arange(5, device="cuda")).argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, generator=generator, device="cuda").half()
        first = model.experts(x, chosen, weights)
        assert all(torch.equal(model.experts(x, chosen, weights), first) for _again in range(5))
        groups = model.experts._grouped._group(chosen.reshape(-1), 2, 32)
        wanted = chosen.reshape(-1).argsort(stable=True)
        assert torch.equal(groups.sources.long(), wanted // 2) and torch.equal(groups.experts, chosen.reshape(-1)[wanted])
        assert torch.equal(groups.row_of.long(), wanted.argsort())
