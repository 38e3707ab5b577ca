"""Experts of a prompt, most of which go to some experts, on a GPU that is emulated."""

import importlib

import emulated_gpu
import pytest
import torch
from test_cuda_every_architecture import NEW
from test_cuda_experts import error, random_experts
from transformers import AutoConfig

from gptq_webui.gptq.cuda import cuda_experts, grouped_experts, replaced_layers

pytestmark = NEW
KINDS = [
    ("gpt_oss", "GptOssExperts", True),
    ("gpt_oss", "GptOssExperts", False),
    ("mixtral", "MixtralExperts", True),
    ("mixtral", "MixtralExperts", False),
    ("nemotron_h", "NemotronHExperts", True),
    ("nemotron_h", "NemotronHExperts", False),
]


def experts_of(kind, monkeypatch, orders="natural"):
    """A model of five experts, what they are given, and what they give before our kernels take them."""
    architecture, name, bias = kind
    module = importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")
    own = {"moe_intermediate_size": 192} if architecture == "nemotron_h" else {}
    config = AutoConfig.for_model(architecture, hidden_size=128, intermediate_size=192, num_local_experts=5, **own)
    model = torch.nn.Module()
    model.dtype = torch.float16
    model.experts = random_experts(getattr(module, name)(config), bias, device="cpu", orders=orders)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 128, generator=generator).half()
    chosen = torch.rand(300, 5, generator=generator)
    chosen[:, 3] += 1.0  # by nearly all
    chosen[:, 1] = -1.0  # by nobody
    chosen = chosen.argsort(1, descending=True)[:, :2]
    weights = torch.rand(300, 2, generator=generator).half()
    wanted = model.experts(x.float(), chosen, weights.float())
    emulated_gpu.emulate(monkeypatch)
    replaced_layers.replace_layers(model, merge=False)
    assert isinstance(model.experts, cuda_experts.CudaExperts)
    return model, (x, chosen, weights), wanted


@pytest.fixture(params=KINDS, ids=lambda each: f"{each[0]}-{each[2]}")
def model(request, monkeypatch):
    return experts_of(request.param, monkeypatch)


@pytest.mark.parametrize("dense", [1 << 27, 2 * 384 * 128], ids=["one group", "groups of two"])
@pytest.mark.parametrize("waste", [-1, 100, 1 << 30], ids=["apart", "some apart", "together"])
def test_every_choice_is_computed_whichever_product_computes_it(model, monkeypatch, waste, dense):
    made, given, wanted = model
    monkeypatch.setattr(made.experts, "_grouped", None)
    monkeypatch.setattr(cuda_experts, "_WASTE", waste)
    monkeypatch.setattr(cuda_experts, "_DENSE", dense)
    apart, products = [], cuda_experts.CudaExperts._apart
    monkeypatch.setattr(cuda_experts.CudaExperts, "_apart", lambda self, *rest: apart.append(rest[3]) or products(self, *rest))
    found = made.experts(*given)
    assert error(found, wanted) < 3e-3
    assert bool(apart) == (waste < 1 << 30) and sum(map(sum, apart)) <= 600
    if waste == -1:
        assert sum(map(sum, apart)) == 600


@pytest.mark.parametrize("orders", ["natural", "one", "of each expert"])
@pytest.mark.parametrize("tokens", [90, 300])
def test_all_experts_are_multiplied_by_one_launch_that_asks_nothing_of_the_host(tokens, orders, monkeypatch):
    for kind in KINDS:
        made, (x, chosen, weights), wanted = experts_of(kind, monkeypatch, orders)
        monkeypatch.setattr(made.experts, "_all", None)
        found = []
        emulated_gpu.Recorder(None).record(lambda: found.append(made.experts(x[:tokens], chosen[:tokens], weights[:tokens])))  # noqa: B023
        assert error(found[0], wanted[:tokens]) < 3e-3, kind
        monkeypatch.undo()


def test_what_the_launch_does_not_take_is_computed_by_dense_weights(monkeypatch):
    made, given, wanted = experts_of(KINDS[3], monkeypatch)
    for name, value in (("_MOST_ROWS", 599), ("_MOST_BYTES", 600 * 192 * 2), ("SCRATCH_COUNTERS", 1)):
        with monkeypatch.context() as changed:
            changed.setattr(grouped_experts, name, value)
            assert not made.experts._grouped.takes(300, 2) and error(made.experts(*given), wanted) < 3e-3
    assert made.experts._grouped.takes(300, 2)
    assert made.experts._grouped.takes(640, 2) and not made.experts._grouped.takes(641, 2), "more than 256 rows of each expert"


def test_rows_beyond_fp16_are_cut_off_before_dense_weights(monkeypatch):
    made, (rows, *choices), _wanted = experts_of(KINDS[3], monkeypatch)
    monkeypatch.setattr(grouped_experts, "_MOST_ROWS", 599)
    large = rows.bfloat16()
    large[0, 5], large[0, 9] = 1e6, -1e6
    given, plain = [], made.experts._all
    monkeypatch.setattr(made.experts, "_all", lambda x, *rest: given.append(x) or plain(x, *rest))
    assert made.experts(large, *choices)[1:].isfinite().all()
    assert given[0].dtype == torch.float16 and given[0][0, [5, 9]].tolist() == [65504, -65504]


def test_a_square_beyond_fp16_is_its_largest_number(monkeypatch):
    made, _given, _wanted = experts_of(KINDS[5], monkeypatch)
    assert made.experts._gate_up.active == 4
    found = made.experts._gated(torch.tensor([[-300.0, 2.0, 300.0, 60000.0]]).half(), torch.zeros(1, 1, dtype=torch.long))
    assert found.tolist() == [[0, 4, 65504, 65504]]
