"""gptq/cpu: what a conversation keeps where attention is not Llama's: latent vectors (MLA), sinks, windows, chunks."""

import pytest
import torch
import transformers

pytest.importorskip("numba")

from family_variants import DENSE_IN_4
from test_families import IDS, off, packed

from gptq_webui.core.errors import BadCheckpoint
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.families.known import parts_of
from gptq_webui.gptq.gptq_linear import GPTQLinear

LONG = (IDS * 12)[:420]
KINDS = {
    "gpt_oss": {"max_position_embeddings": 600},
    "deepseek_v2": {"max_position_embeddings": 600, "q_lora_rank": None},
    "deepseek_v3": {"max_position_embeddings": 600, "first_k_dense_replace": 1},
    "llama4_text": {"max_position_embeddings": 600, "attention_chunk_size": 24, "floor_scale": 100},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    older = transformers.__version__ < "5"
    if request.param not in transformers.CONFIG_MAPPING or (older and request.param in DENSE_IN_4):
        pytest.skip("this transformers cannot make such a model")
    hf, twin = packed(request.param, KINDS[request.param])
    stepper = CpuStepper(parts_of(hf), 600, 2, parallel=8)
    yield stepper, hf, twin
    stepper.close()


@torch.inference_mode()
def test_rows_of_several_conversations_get_the_logits_of_single_steps(model):
    stepper = model[0]
    pieces, wanted = [], []
    for at, length in enumerate((1, 23, 300, 5)):
        memory = stepper.begin()
        stepper.prefill(memory, LONG[:length])
        new = LONG[length : length + 1 + at]
        alone = memory.fork(length)
        wanted += [stepper.step(alone, id).clone() for id in new]
        pieces.append((memory, new))
    assert torch.equal(stepper.rows_logits(pieces), torch.cat(wanted))


@torch.inference_mode()
def test_a_prompt_in_pieces_and_one_that_is_cut_and_goes_on_are_the_twins(model):
    stepper, _hf, twin = model
    wanted = twin(torch.tensor([LONG])).logits[0]
    assert off(stepper.all_logits(stepper.begin(), LONG), wanted) < 1e-3
    memory = stepper.begin()
    at = 0
    for size in (1, 30, 17, 256, 3, 40):
        assert off(stepper.prefill(memory, LONG[at : at + size]), wanted[at + size - 1 : at + size]) < 1e-3
        at += size
    memory.cut(100)
    assert off(stepper.prefill(memory, LONG[100:333]), wanted[332:333]) < 1e-3
    other = memory.fork(50)
    assert off(stepper.step(other, LONG[50]), wanted[50:51]) < 1e-3


@torch.inference_mode()
def test_an_answer_with_guesses_is_that_of_single_steps(model):
    """A text that repeats itself: guesses are computed beside the token, as several rows."""
    stepper = model[0]
    memory = stepper.begin()
    logits = stepper.prefill(memory, LONG[:80])[0]
    wanted = []
    for _ in range(24):
        wanted.append(int(logits.argmax()))
        logits = stepper.step(memory, wanted[-1])[0]
    memory = stepper.begin()
    found = [int(stepper.prefill(memory, LONG[:80])[0].argmax())]
    running = stepper.running(memory, LONG[:80])
    while len(found) < 24:
        running.give(found[-1])
        found.append(int(running.logits()[0].argmax()))
    running.close()
    assert found == wanted


@torch.inference_mode()
def test_one_thread_and_three_compute_the_same_bits(model, request):
    kind = request.node.callspec.params["model"]
    found = []
    for threads in (1, 3):
        stepper = CpuStepper(parts_of(packed(kind, KINDS[kind])[0]), 64, threads)
        memory = stepper.begin()
        found.append(torch.cat([stepper.prefill(memory, IDS[:20]), stepper.step(memory, 7).clone()]))
        stepper.close()
    assert torch.equal(*found)


@torch.inference_mode()
def test_a_conversation_keeps_one_latent_vector_for_all_heads(model, request):
    stepper, hf, _twin = model
    if not request.node.callspec.params["model"].startswith("deepseek"):
        pytest.skip("no latent vector")
    memory = stepper.begin()
    stepper.prefill(memory, LONG[:300])
    attention = hf.model.layers[0].self_attn
    rank, turned = attention.kv_lora_rank, attention.qk_rope_head_dim
    assert memory.size_bytes == memory.capacity * len(hf.model.layers) * 2 * (2 * rank + turned)
    assert not any(each.qweight.numel() for each in hf.modules() if isinstance(each, GPTQLinear)), "no weight is held unpacked"


@torch.inference_mode()
def test_an_adapter_changes_the_layers_around_a_latent_vector():
    hf, twin = packed("deepseek_v3", {"first_k_dense_replace": 1})
    stepper = CpuStepper(parts_of(hf), 64, 2)
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for at, layer in enumerate(hf.model.layers):
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            module = layer.self_attn.get_submodule(name)
            inner = torch.randn(4, module.in_features, generator=generator) * 0.05
            outer = torch.randn(module.out_features, 4, generator=generator) * 0.2
            parts[f"model.layers.{at}.self_attn.{name}"] = module, inner, outer
    before = twin(torch.tensor([IDS])).logits[0]
    for name, (_module, inner, outer) in parts.items():
        twin.get_submodule(name).weight.data += outer @ inner
    wanted = twin(torch.tensor([IDS])).logits[0]
    assert off(before, wanted) > 0.05
    memory = stepper.begin()
    memory.adapter = stepper.adapter([(parts, 1.0)])
    found = [stepper.prefill(memory, IDS[:24]).clone()] + [stepper.step(memory, id).clone() for id in IDS[24:]]
    assert off(torch.cat(found), wanted[23:]) < 1e-3
    of_values = hf.model.layers[0].self_attn.kv_b_proj
    with pytest.raises(BadCheckpoint, match="that the step computes by itself"):
        stepper.adapter([({"kv_b_proj": (of_values, torch.zeros(4, 16), torch.zeros(of_values.out_features, 4))}, 1.0)])
    stepper.close()
