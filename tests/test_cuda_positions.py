"""gptq/cuda: rotary angles from a table, and the causal mask as one comparison; against what transformers computes."""

import importlib
from contextlib import ExitStack

import pytest
import torch
import transformers
from every_architecture import tiny_model
from test_families import IDS, off, packed
from torch import nn
from transformers import AutoConfig

from gptq_webui.gptq.cuda import positions
from gptq_webui.gptq.cuda.fused_forward import FusedForward
from gptq_webui.gptq.cuda.graphs import GraphRecorder
from gptq_webui.gptq.cuda.positions import Positions
from gptq_webui.gptq.cuda.replaced_layers import replace_layers
from gptq_webui.gptq.graph_stepper import GraphStepper
from gptq_webui.gptq.static_cache import StaticRoom
from gptq_webui.gptq.transformers_stepper import TransformersStepper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
new = pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 makes its masks elsewhere")


class Computes:
    """In the place of a GPU."""

    def __init__(self):
        self.launched = 0

    def run(self, _name, _grid, _threads, given, **_more):
        self.launched += 1
        row = int(given["position"])
        given["cosines_out"].view(-1).copy_(given["cosines"][row])
        given["sines_out"].view(-1).copy_(given["sines"][row])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(positions.LOOK_UP, "pack", lambda **given: given)
    monkeypatch.setattr(positions, "on_gpu", lambda x: True)
    monkeypatch.setattr(positions, "suffix", lambda x: "half")
    return Computes()


def rotary_of(kind, name, **facts):
    source = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    config = AutoConfig.for_model(kind, hidden_size=64, num_attention_heads=4, head_dim=32, max_position_embeddings=64, **facts)
    return nn.Sequential(getattr(source, f"{name}RotaryEmbedding")(config))


@torch.inference_mode()
def test_angles_come_from_a_table_of_all_positions(gpu):
    model, x = rotary_of("llama", "Llama"), torch.zeros(1, 1, 64, dtype=torch.float16)
    wanted = {at: model[0](x, torch.tensor([[at]])) for at in (0, 3, 49)}
    own, first = Positions(gpu), True
    with ExitStack() as undo:
        own.take(model, 50, lambda: first, undo)
        found = model[0](x, position_ids=torch.tensor([[3]]))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[3], strict=True)) and not gpu.launched
        first = False
        for at, angles in wanted.items():
            found = model[0](x, torch.tensor([[at]]))
            assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, angles, strict=True))
        assert gpu.launched == 3
        several = torch.tensor([[4, 5]])
        assert model[0](x, several)[0].shape[1] == 2 and gpu.launched == 3
        assert model[0](x.bfloat16(), torch.tensor([[3]]))[0].dtype == torch.bfloat16 and gpu.launched == 3  # not learnt
        kept = next(iter(own._tables.values()))
        own.take(model, 50, lambda: True, undo)
        model[0](x, torch.tensor([[7]]))
        assert next(iter(own._tables.values()))[0] is kept[0], "a recorded graph reads this table"
    assert "forward" not in vars(model[0])


@torch.inference_mode()
def test_angles_of_more_than_the_position_are_computed_anew(gpu):
    class CountingRotaryEmbedding(nn.Module):
        def forward(self, x, position_ids):
            angle = position_ids[..., None] * torch.arange(8) + position_ids.shape[1]  # depends on how many are asked for
            return angle.cos().half(), angle.sin().half()

    model, x = nn.Sequential(CountingRotaryEmbedding()), torch.zeros(1, 1, 64, dtype=torch.float16)
    wanted = model[0](x, torch.tensor([[5]]))
    own, first = Positions(gpu), True
    with ExitStack() as undo:
        own.take(model, 50, lambda: first, undo)
        for first in (True, False):  # noqa: B007
            assert torch.equal(model[0](x, torch.tensor([[5]]))[0], wanted[0])
    assert not gpu.launched


@new
@torch.inference_mode()
def test_the_causal_mask_is_one_comparison(gpu):
    model = tiny_model("llama")
    source = importlib.import_module(type(model).__module__)
    original, stepper = source.create_causal_mask, TransformersStepper(model)
    memory = stepper.begin()
    stepper.prefill(memory, IDS[:5])
    room = StaticRoom(memory, 48)
    room.enter(memory)
    room.show(12)
    given = {"config": model.config, "inputs_embeds": torch.zeros(1, 1, 64), "attention_mask": None}
    given[stepper.cache_argument] = room.cache
    own, first, learnt = Positions(gpu), True, []
    with ExitStack() as undo:
        own.take(model, 48, lambda: first, undo)
        assert source.create_causal_mask is not original
        for first in (True, False):  # noqa: B007
            for at in (5, 0, 11):
                room.count.fill_(at)
                assert source.create_causal_mask(**given)[0, 0, 0].tolist() == [each <= at for each in range(12)]
                learnt.append(own._tokens[12] is not None)
        every = source.create_causal_mask(**given, or_mask_function=lambda _batch, _head, _query, key: key >= 0)
        assert bool(every.all()), "a mask of another kind"
    assert learnt == [True] * 6 and source.create_causal_mask is original


@needs_gpu
@new
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_next", "glm4"])
@torch.inference_mode()
def test_a_recorded_model_knows_its_positions(kind):
    hf, twin = packed(kind, {"max_position_embeddings": 4096}, act_order=False)
    hf = hf.half().cuda()
    replace_layers(hf)
    device = torch.device("cuda", 0)
    stepper = GraphStepper(hf, 4096, GraphRecorder(device), FusedForward(hf, device))
    stepper.trial()
    assert not stepper.why
    ids = (IDS * 30)[:1040]
    wanted = twin(torch.tensor([ids])).logits[0].cuda()
    for start in (20, 1015):  # below and above the tokens that a graph shows at first
        memory = stepper.begin()
        stepper.prefill(memory, ids[:start])
        errors = [off(stepper.step(memory, ids[at]), wanted[at : at + 1]) for at in range(start, start + 20)]
        assert sum(each > 3e-2 for each in errors) <= 2, errors
    tables, tokens = stepper._fused._positions._tables, stepper._fused._positions._tokens
    assert tables and None not in tables.values() and tokens and None not in tokens.values()
    stepper.close()
