"""gptq/cpu/expert_phases.py: mixtures of experts in the compiled step, whatever their layout, and several rows at once."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("numba")

from test_families import IDS, off, packed

import tiny
from gptq_webui.gptq import checkpoint
from gptq_webui.gptq.cpu import cpu_step
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.families.mixtures import experts_of
from gptq_webui.gptq.families.parts import Expert
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.suitability import Unsuited, shape_of

KIND, CHANGES = "qwen2_moe", {"norm_topk_prob": False, "num_experts": 7, "num_experts_per_tok": 3}
LONG = (IDS * 12)[:420]


@pytest.fixture(scope="module")
def mixture():
    hf, twin = packed(KIND, {**CHANGES, "max_position_embeddings": 600})
    parts = parts_of(hf)
    stepper = CpuStepper(parts, 600, 2, parallel=8)
    yield stepper, hf, twin
    stepper.close()


@torch.inference_mode()
def test_rows_of_several_conversations_get_the_logits_of_single_steps(mixture):
    stepper = mixture[0]
    pieces, wanted = [], []
    for at, length in enumerate((1, 17, 300, 5)):
        memory = stepper.begin()
        stepper.prefill(memory, LONG[:length])
        new = LONG[length : length + 1 + at]
        alone = memory.fork(length)
        wanted += [stepper.step(alone, id).clone() for id in new]
        pieces.append((memory, new))
    assert torch.equal(stepper.rows_logits(pieces), torch.cat(wanted))


@torch.inference_mode()
def test_a_prompt_of_several_chunks_is_that_of_the_twin(mixture):
    stepper, _hf, twin = mixture
    wanted = twin(torch.tensor([LONG])).logits[0]
    found = stepper.all_logits(stepper.begin(), LONG)
    assert off(found, wanted) < 1e-3
    assert off(stepper.prefill(stepper.begin(), LONG), wanted[-1:]) < 1e-3


@torch.inference_mode()
def test_one_thread_and_three_compute_the_same_bits(mixture):
    found = []
    for threads in (1, 3):
        stepper = CpuStepper(parts_of(packed(KIND, CHANGES)[0]), 64, threads)
        memory = stepper.begin()
        found.append(torch.cat([stepper.prefill(memory, IDS[:20]), stepper.step(memory, 7).clone()]))
        stepper.close()
    assert torch.equal(*found)


def changed(hf, twin, bits=4, group=32, act_order=True, bias=False, sym=True, seed=3, layouts=()):
    """Other packed experts in the place of a model's own; the twin's become theirs. `layouts`: (bits, group) of them in turn."""
    layouts = layouts or [(bits, group)]
    generator = torch.Generator().manual_seed(seed)
    for layer, dense in zip(hf.model.layers, twin.model.layers, strict=True):
        for at, expert in enumerate(experts_of(layer.mlp.experts)):
            names = ("gate_proj", "up_proj", "down_proj")
            made = []
            for module in (*expert.gate_up, expert.down):
                rows, columns = module.in_features, module.out_features
                bits, group = layouts[(at + len(made)) % len(layouts)]
                tensors, _dense = tiny.random_layer(rows, columns, bits, group, act_order=act_order, sym=sym, generator=generator)
                if bias:
                    tensors["bias"] = torch.randn(columns, generator=generator).half() * 0.1
                one = GPTQLinear(rows, columns, bits, group, bias=bias)
                one.load_state_dict(tensors | {"scales": tensors["scales"] * 0.5})
                made.append(one)
            owner = layer.mlp.experts.get_submodule(str(at))
            for name, one in zip(names, made, strict=True):
                setattr(owner, name, one)
            if isinstance(dense.mlp.experts, nn.ModuleList):
                for name, one in zip(names, made, strict=True):
                    setattr(dense.mlp.experts[at], name, one)
            elif not bias:
                weights = [one.dequantize().float() for one in made]
                dense.mlp.experts.gate_up_proj.data[at] = torch.cat(weights[:2])
                dense.mlp.experts.down_proj.data[at] = weights[2]


@pytest.mark.parametrize("settings", [
    {"layouts": [(4, 16), (4, 64), (4, -1)], "inner": 96},
    {"layouts": [(8, 48), (2, 32), (3, 16), (4, 64), (8, -1)], "inner": 192},
    {"bits": 2, "group": 16, "inner": 48},
    {"bits": 3, "group": -1, "inner": 96, "act_order": False},
    {"bits": 8, "group": 32, "inner": 40, "sym": False},
    {"bits": 4, "group": 32, "inner": 40, "act_order": False, "bias": True},
    {"bits": 4, "group": -1, "inner": 200},
], ids=str)  # fmt: skip
@torch.inference_mode()
def test_experts_of_every_layout(settings):
    """Some have no whole tiles of outputs, and inputs that are padded. Layouts may differ from expert to expert."""
    own = {name: value for name, value in settings.items() if name != "inner"}
    hf, twin = packed("qwen3_moe", {"moe_intermediate_size": settings["inner"], "num_experts": 3})
    changed(hf, twin, **own)
    if settings.get("bias"):  # 3-D weights have no place for one: the twin has a copy of the packed layers
        for layer, dense in zip(hf.model.layers, twin.model.layers, strict=True):
            dense.mlp.experts = copy.deepcopy(layer.mlp.experts)
    wanted = twin(torch.tensor([IDS])).logits[0]
    stepper = CpuStepper(parts_of(hf), 64, 2)
    memory = stepper.begin()
    found = [stepper.prefill(memory, IDS[:24]).clone()] + [stepper.step(memory, id).clone() for id in IDS[24:]]
    assert off(torch.cat(found), wanted[23:]) < 1e-3
    stepper.close()


@torch.inference_mode()
def test_the_correction_of_the_choice_changes_the_choice_alone():
    hf, twin = packed("dots1", {"norm_topk_prob": True, "routed_scaling_factor": 1.7})
    for model in (hf, twin):
        for layer in model.model.layers:
            if hasattr(layer.mlp, "gate") and hasattr(layer.mlp.gate, "e_score_correction_bias"):
                layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0.4, -2.0]))
    wanted = twin(torch.tensor([IDS])).logits[0]
    stepper = CpuStepper(parts_of(hf), 64, 1)
    assert stepper._experts["choice_bias"][0, 3] == -2
    assert off(stepper.all_logits(stepper.begin(), IDS), wanted) < 1e-3
    stepper.close()


@torch.inference_mode()
def test_numbers_that_are_none_choose_some_expert():
    """What the router gives is NaN; no memory beyond the experts is read."""
    hf, _twin = packed("mixtral")
    parts = parts_of(hf)
    parts.layers[1].experts.router.weight.data[2] = float("nan")
    stepper = CpuStepper(parts, 64, 2)
    stepper.step(stepper.begin(), 5)
    chosen = stepper._one.kept["experts.chosen"]
    assert len(set(chosen.tolist())) == len(chosen) and chosen.min() >= 0 and chosen.max() < 4
    stepper.close()


def in_experts(**change):
    def alter(parts):
        layer = parts.layers[1]
        return replace(
            parts, layers=(parts.layers[0], replace(layer, experts=replace(layer.experts, **change)), *parts.layers[2:])
        )

    return alter


def dense_expert(parts):
    experts = parts.layers[1].experts.experts
    return in_experts(experts=(Expert(experts[0].gate_up, nn.Linear(32, 64, bias=False)), *experts[1:]))(parts)


@pytest.mark.parametrize(("alter", "says"), [
    (in_experts(choices=8), "8 experts for each token, of 7"),
    (in_experts(choices=0), "0 experts for each token"),
    (in_experts(choices=2), "experts of different sizes, or chosen in different ways"),
    (in_experts(router=nn.Linear(64, 6)), "a router that does not fit"),
    (in_experts(choice_bias=torch.zeros(6)), "by numbers that do not fit them"),
    (in_experts(scale=float("inf")), "by numbers that do not fit them"),
    (in_experts(shared_gate=nn.Linear(64, 2)), "a weight of the shared expert"),
    (in_experts(groups=2), "groups of experts that do not fit them"),
    (in_experts(groups=7, chosen_groups=2), "groups of experts that do not fit them"),
    (in_experts(groups=7, chosen_groups=7, group_best=2), "groups of experts that do not fit them"),
    (in_experts(groups=7, chosen_groups=8), "groups of experts that do not fit them"),
    (dense_expert, "experts that are not packed"),
    (lambda parts: in_experts(experts=parts.layers[1].experts.experts[:-1])(parts), "a router that does not fit"),
])  # fmt: skip
def test_what_does_not_fit_together_is_found_before_a_step_is_built(alter, says):
    hf, _twin = packed(KIND, CHANGES)
    parts = parts_of(hf)
    assert shape_of(parts, cpu_step.LIMITS).layers == 4
    with pytest.raises(Unsuited, match=says):
        CpuStepper(alter(parts), 64, 1)
    assert all(each.qweight.numel() for each in parts.linears() if isinstance(each, GPTQLinear)), "nothing was taken"


def test_a_folder_of_experts_takes_the_compiled_step(tmp_path):
    from gptq_webui.core.models import LocalModel
    from gptq_webui.gptq.stepper_choice import stepper_for

    twin = tiny.write(tmp_path / "model", "mixtral")
    hf, _notes = checkpoint.load(LocalModel.read(tmp_path / "model"), dtype=torch.float32, device_map="cpu")
    stepper, note = stepper_for(hf, 64)
    assert isinstance(stepper, CpuStepper) and note == ""
    assert not any(each.qweight.numel() for each in hf.modules() if isinstance(each, GPTQLinear)), "no weight is held twice"
    with torch.inference_mode():
        wanted = twin(torch.tensor([IDS])).logits[0]
        assert off(stepper.all_logits(stepper.begin(), IDS), wanted) < 1e-3
        assert off(hf(torch.tensor([IDS])).logits[0], wanted) < 1e-3
    stepper.close()


@pytest.mark.skipif(transformers.__version__ < "5", reason="its router gives no choices that a test can change")
@torch.inference_mode()
def test_where_two_experts_tie_the_twin_with_the_other_choice_is_computed():
    """Scores that differ by 6 of 100,000: less than the rounding of the layers before. Nothing but that choice differs."""
    hf, twin = packed("flex_olmo", {"sliding_window": None, "num_experts_per_tok": 3, "norm_topk_prob": False})
    margins = []

    def exchange(_router, _inputs, output):
        logits, weights, index = (each.clone() for each in output)
        scores, order = logits.softmax(-1).sort(-1, descending=True)
        apart = (scores[:, 2] - scores[:, 3]) / scores[:, 2]
        at = int(apart.argmin())
        margins.append((at, float(apart[at])))
        slot = index[at] == order[at, 2]
        index[at, slot], weights[at, slot] = order[at, 3], scores[at, 3]
        return logits, weights, index

    usual = twin(torch.tensor([IDS])).logits[0]
    twin.model.layers[2].mlp.gate.register_forward_hook(exchange)
    other = twin(torch.tensor([IDS])).logits[0]
    stepper = CpuStepper(parts_of(hf), 64, 1)
    memory = stepper.begin()
    found = torch.cat([stepper.prefill(memory, IDS[:24]), *(stepper.step(memory, id).clone() for id in IDS[24:])])
    at, margin = margins[0]
    assert at == 35 and margin < 1e-4
    assert off(found[12:], other[35:]) < 1e-3 < 0.05 < off(found[12:], usual[35:])
    assert off(found[:12], usual[23:35]) < 1.1e-3
    stepper.close()


def test_a_thread_that_lags_behind_is_waited_for_and_no_longer():
    """More threads than cores: some are suspended where the others go on to the next layer and choose its experts."""
    hf, _twin = packed("hunyuan_v1_moe" if "hunyuan_v1_moe" in transformers.CONFIG_MAPPING else "mixtral")
    stepper = CpuStepper(parts_of(hf), 64, 4, parallel=4)
    memory = stepper.begin()
    stepper.prefill(memory, IDS[:8])

    def passes():
        for _ in range(300):
            memory.cut(8)
            stepper.rows_logits([(memory, IDS[8:13])])

    thread = threading.Thread(target=passes, daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    stepper.close()
