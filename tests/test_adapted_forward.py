"""Forwards that are computed otherwise while they are recorded (adapted_forward.py, chosen_experts.py, identity_experts.py)."""

import importlib
from contextlib import ExitStack

import emulated_gpu
import pytest
import torch
from every_architecture import KINDS, tiny_model
from test_cuda_every_architecture import NEW
from test_cuda_experts import error as experts_error
from test_cuda_experts import random_experts
from test_transformers_stepper import IDS, check, error, whole
from torch import nn
from transformers import AutoConfig

from gptq_webui.gptq import chosen_experts
from gptq_webui.gptq.adapted_forward import adapted
from gptq_webui.gptq.chosen_experts import take_experts
from gptq_webui.gptq.cuda import replaced_layers
from gptq_webui.gptq.cuda.identity_experts import WithIdentity
from gptq_webui.gptq.graph_stepper import FIRST_CAPACITY, GraphStepper

pytestmark = NEW
COUNT = torch.tensor([3])


def recorded(model, context_tokens=256):
    stepper = GraphStepper(model, context_tokens, emulated_gpu.Recorder(None))
    stepper.trial()
    assert not stepper.why
    return stepper


@pytest.mark.parametrize("kind", [each for each in ("dbrx", "jetmoe", "gpt_neo") if each in KINDS])
def test_a_conversation_continues_as_one_forward_over_all_of_it(kind):
    model = tiny_model(kind)
    stepper = recorded(model)
    check(model, stepper)
    check(model, stepper)
    assert not stepper.why
    stepper.close()
    assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("positions", [FIRST_CAPACITY + 40, 2 * FIRST_CAPACITY])
def test_a_window_of_gpt_neo_follows_the_text_to_its_end(positions):
    model = tiny_model("gpt_neo", max_position_embeddings=positions)
    stepper = recorded(model, positions)
    ids = (IDS * 60)[:positions]
    wanted = whole(model, ids)
    with torch.inference_mode():
        memory = stepper.begin()
        stepper.prefill(memory, ids[: FIRST_CAPACITY - 3])
        for at in range(FIRST_CAPACITY - 3, FIRST_CAPACITY + 3):
            assert error(stepper.step(memory, ids[at]), wanted[at]) < 1e-4
        stepper.prefill(memory, ids[memory.length : positions - 2])
        for at in range(positions - 2, positions):
            assert error(stepper.step(memory, ids[at]), wanted[at]) < 1e-4
        assert memory.cut(20)
        assert error(stepper.step(memory, ids[20]), wanted[20]) < 1e-4
    assert not stepper.why


def table(positions=32, window=8):
    every = torch.ones(positions, positions, dtype=torch.bool).tril()
    return (every ^ every.tril(-window))[None, None]


@pytest.mark.parametrize("shown", [16, 32, 40])
def test_each_row_reads_what_its_own_token_sees(shown):
    model = nn.Module()
    model.mask = nn.Buffer(table())
    counts = torch.tensor([3, 12, 0])
    with adapted(model, counts, shown):
        found = model.mask[:, :, shown - 1 : shown, :shown]
    wanted = nn.functional.pad(table(), (0, 8))[0, 0, counts, :shown]
    assert torch.equal(found, wanted[:, None, None])


def test_other_places_of_a_table_and_other_tensors_stay_as_they_are():
    model = nn.Module()
    model.mask, model.other = nn.Buffer(table()), nn.Buffer(table().float())
    with adapted(model, COUNT, 16):
        for part in ((..., slice(15, 16)), (slice(None), slice(None), slice(4, 16), slice(16)), (0, 0), 0, (0, 0, COUNT)):
            assert torch.equal(model.mask[part], table()[part])
        assert torch.equal(model.other[:, :, 15:16, :16], table().float()[:, :, 15:16, :16])
        assert torch.equal(table()[:, :, 15:16, :16], model.other[:, :, 15:16, :16].bool())
    assert torch.equal(model.mask[:, :, 15:16, :16], table()[:, :, 15:16, :16])


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize(("kind", "asks"), [("dbrx", True), ("jetmoe", True), ("mixtral", False), ("gpt_neo", False)])
def test_experts_are_picked_without_waiting_and_as_their_own_forward_does(kind, asks, tokens, monkeypatch):
    model = tiny_model(kind, **({"num_local_experts": 8} if kind == "jetmoe" else {}))
    ids = torch.tensor(IDS[: 4 * tokens]).view(tokens, 4)
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
        emulated_gpu.emulate(monkeypatch)

        def record():
            emulated_gpu.Recorder(None).record(lambda: model(input_ids=ids, use_cache=False))

        if asks:
            with pytest.raises(RuntimeError, match="synchronizing operation"):
                record()
        with ExitStack() as undo:
            take_experts(model, undo)
            changed = [each for each in model.modules() if "forward" in vars(each)]
            assert bool(changed) is asks
            if asks:
                record()
            found = model(input_ids=ids, use_cache=False).logits
        assert not any("forward" in vars(each) for each in model.modules())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_product_of_each_row_and_its_expert_is_the_same_for_few_rows_and_for_many():
    weights, experts = torch.randn(10, 6, 8), torch.tensor([7, 0, 3, 3, 9])
    x = torch.randn(5, 6)
    wanted = torch.stack([row @ weights[at] for row, at in zip(x, experts, strict=True)])
    for rows in (1, 3, 4, 5):
        for given in (weights, weights.mT.contiguous().mT):
            assert torch.allclose(chosen_experts._product(x[:rows], given, experts[:rows]), wanted[:rows], atol=1e-5)


def test_modules_of_other_forms_are_left_alone():
    class Counted(nn.Module):
        def forward(self, x, sizes):
            return x

    model = nn.Module()
    model.router, model.input_linear, model.output_linear = (Counted() for _ in range(3))
    model.router.layer, model.router.top_k = nn.Linear(4, 4), 2
    model.input_linear.weight = model.output_linear.weight = nn.Parameter(torch.zeros(2, 3, 4))
    with ExitStack() as undo:
        take_experts(model, undo)
        assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("tokens", [1, 9, 16, 17, 300])
def test_choices_that_are_no_experts_leave_a_token_as_it_is(tokens, monkeypatch):
    module = importlib.import_module("transformers.models.longcat_flash.modeling_longcat_flash")
    config = AutoConfig.for_model(
        "longcat_flash", hidden_size=128, expert_ffn_hidden_size=192, n_routed_experts=5, zero_expert_num=3
    )
    model = nn.Module()
    model.dtype = torch.float16
    model.experts = random_experts(module.LongcatFlashExperts(config), False, device="cpu")
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(tokens, 128, generator=generator).half(), torch.rand(tokens, 3, generator=generator)
    chosen = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :3]
    chosen[0] = torch.tensor([6, 7, 5])  # no expert at all
    wanted = model.experts(x.float(), chosen, weights)
    emulated_gpu.emulate(monkeypatch)
    replaced, left = replaced_layers.replace_layers(model, merge=False)
    assert (replaced, left) == (15, 0) and isinstance(model.experts, WithIdentity)
    found = model.experts(x, chosen, weights)
    assert found.dtype == torch.float16 and experts_error(found, wanted) < 3e-3
    assert experts_error(found[0], x[0] * weights[0].sum()) < 1e-3
