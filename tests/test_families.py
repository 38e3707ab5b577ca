"""gptq/families on the processor: every family and each of its variants, packed, against transformers' dense twin."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("numba")

from every_architecture import tiny_model
from family_variants import DENSE_IN_4, VARIANTS

import tiny
from gptq_webui.core.errors import BadParameter
from gptq_webui.gptq.cpu import cpu_step
from gptq_webui.gptq.cpu.cpu_step import CpuStepper
from gptq_webui.gptq.cuda import model_shape
from gptq_webui.gptq.experts import PackedExperts, is_dense_experts
from gptq_webui.gptq.families.differences import OPTIONS, options_of
from gptq_webui.gptq.families.known import KINDS, has_gpu_step, parts_for_gpu, parts_of
from gptq_webui.gptq.families.parts import Norm
from gptq_webui.gptq.gptq_linear import GPTQLinear
from gptq_webui.gptq.stepper_choice import stepper_for
from gptq_webui.gptq.suitability import Unsuited, shape_of

IDS = torch.randint(5, 260, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT = 24


def packed(kind, changes=None, seed=0, act_order=True):
    """(a tiny model whose decoder layers are packed in 4 bits, its dense twin)."""
    twin = tiny_model(kind, seed, **(changes or {}))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in twin.parameters():
        if parameter.dim() == 1:  # norms and biases show too
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    hf = copy.deepcopy(twin)
    for name, module in tiny.packable(twin).items():
        if name.endswith(("shared_expert_gate", "gate.wg", "router", "dt_proj")):
            continue
        conv = type(module).__name__ == "Conv1D"
        rows, columns = module.weight.shape if conv else module.weight.shape[::-1]
        tensors, dense = tiny.random_layer(rows, columns, 4, 32, act_order=act_order, generator=generator)
        tensors["scales"], dense = tensors["scales"] * 0.5, dense * 0.5
        layer = GPTQLinear(rows, columns, 4, 32, bias=module.bias is not None)
        layer.load_state_dict(tensors | ({} if module.bias is None else {"bias": module.bias.detach().half()}))
        dense = layer.dequantize().float()
        module.weight.data = dense.T.contiguous() if conv else dense
        if module.bias is not None:
            module.bias.data = layer.bias.detach().float()
        owner, _dot, last = name.rpartition(".")
        setattr(hf.get_submodule(owner), last, layer)
    for name, module in twin.named_modules():
        if is_dense_experts(module):
            owner, _dot, last = name.rpartition(".")
            setattr(hf.get_submodule(owner), last, packed_experts(module, generator, act_order))
    return hf, twin


def packed_experts(dense, generator, act_order=True):
    """The packed form of experts that transformers 5 holds as 3-D weights, which become those of the packed ones."""
    experts = PackedExperts(dense)
    turned = dense.gate_up_proj.shape[2] == 2 * dense.down_proj.shape[1]  # [experts, in, out]
    hidden, inner = dense.down_proj.shape[1:][:: -1 if turned else 1]
    biased = hasattr(dense, "gate_up_proj_bias")
    for at in range(experts.num_experts):
        found = {}
        for name, rows, columns in (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)):
            tensors, _weight = tiny.random_layer(rows, columns, 4, 32, act_order=act_order, generator=generator)
            layer = GPTQLinear(rows, columns, 4, 32, bias=biased)
            bias = {"bias": (torch.randn(columns, generator=generator) * 0.1).half()} if biased else {}
            layer.load_state_dict(tensors | {"scales": tensors["scales"] * 0.5} | bias)
            found[name] = layer
            experts.get_submodule(str(at)).add_module(name, layer)
        both, down = [found[name] for name in ("gate_proj", "up_proj")], found["down_proj"]
        weights = torch.cat([each.dequantize().float() for each in both]), down.dequantize().float()
        for mine, weight in zip((dense.gate_up_proj, dense.down_proj), weights, strict=True):
            mine.data[at] = weight.T if turned else weight
        if biased:
            dense.gate_up_proj_bias.data[at] = torch.cat([each.bias.float() for each in both])
            dense.down_proj_bias.data[at] = down.bias.float()
    return experts


def off(found, wanted):
    """The largest distance of a row, relative to its length."""
    found, wanted = found.double(), wanted.double()
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_computed_as_transformers_does(name):
    kind, changes = VARIANTS[name]
    older = int(transformers.__version__.split(".")[0]) < 5
    if kind not in transformers.CONFIG_MAPPING or (older and changes.get("qk_layernorm")):
        pytest.skip("this transformers cannot make such a model")
    if older and kind.startswith(DENSE_IN_4):
        pytest.skip("transformers 4 keeps such experts dense")
    hf, twin = packed(kind, changes)
    stepper, note = stepper_for(hf, 128, parallel=4)
    assert isinstance(stepper, CpuStepper) and note == ""
    with torch.inference_mode():
        wanted = twin(torch.tensor([IDS])).logits[0]
        memory = stepper.begin()
        found = [stepper.prefill(memory, IDS[:PROMPT]).clone()] + [stepper.step(memory, id).clone() for id in IDS[PROMPT:]]
        assert off(torch.cat(found), wanted[PROMPT - 1 :]) < 1e-3
        # several rows of several conversations, of which one begins with its first token
        memory.cut(PROMPT)
        rows = stepper.rows_logits([(memory, IDS[PROMPT : PROMPT + 3]), (stepper.begin(), IDS[:2])])
        assert off(rows[:3], wanted[PROMPT : PROMPT + 3]) < 1e-3 and off(rows[3:], wanted[:2]) < 1e-3
        assert off(stepper.all_logits(stepper.begin(), IDS), wanted) < 1e-3
        assert off(hf(torch.tensor([IDS])).logits[0], wanted) < 1e-3, "the model itself works on, with its layers' kernels"
        made = twin.generate(
            torch.tensor([IDS]), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        memory = stepper.begin()
        logits = stepper.prefill(memory, IDS)[0]
        for id, theirs in zip(made.sequences[0, len(IDS) :].tolist(), made.logits, strict=True):
            ours = int(logits.argmax())
            assert ours == id or float(theirs[0, id] - theirs[0, ours]) < 2e-3 * float(theirs.std()), "no tie of two tokens"
            logits = stepper.step(memory, id)[0]
    stepper.close()


def test_every_family_that_is_described_has_a_variant_here():
    of_pictures = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}  # tests/test_image_text.py
    of_2023 = {"llama_alibi"}  # tests/test_old_families.py: transformers has no such kind
    assert {kind for kind, _changes in VARIANTS.values()} == set(KINDS) - of_pictures - of_2023


@pytest.mark.parametrize(("kind", "changes"), [
    ("phi", {"qk_layernorm": True}),
    ("olmo", {"clip_qkv": 1.0}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"do_layer_norm_before": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("gemma3_text", {"attn_logit_softcapping": 30.0}),
    ("llama", {"hidden_act": "mish"}),
    ("mixtral", {}),  # its experts are not packed
])  # fmt: skip
def test_what_no_option_names_is_not_described(kind, changes):
    assert parts_of(tiny_model(kind, **changes)) is None


@pytest.mark.parametrize(("kind", "changes"), [
    ("llama4_text", {"attention_chunk_size": None}),  # no module of transformers computes it either
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": None, "topk_group": None}),
    ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),  # without a temperature
])  # fmt: skip
def test_a_setting_that_is_missing_is_not_described(kind, changes):
    if kind not in transformers.CONFIG_MAPPING or transformers.__version__ < "5":
        pytest.skip("this transformers cannot make such a model")
    assert parts_of(packed(kind)[0]) is not None
    assert parts_of(packed(kind, changes)[0]) is None


TRIED_ON_GPU = {"llama", "mistral", "qwen2", "qwen3", "phi3", "seed_oss"}  # seed_oss: its forward is Qwen 2's


def test_the_gpus_step_takes_no_family_that_it_was_not_tried_with():
    limits = replace(model_shape.LIMITS, head_dims=(), numbers=None, hidden_step=1, length_dependent=True)
    taken = set()
    for name, (kind, changes) in VARIANTS.items():
        if kind not in transformers.CONFIG_MAPPING or (transformers.__version__ < "5" and kind.startswith(DENSE_IN_4)):
            continue
        if transformers.__version__ < "5" and changes.get("qk_layernorm"):
            continue
        parts = parts_for_gpu(packed(kind, changes)[0])
        if parts is None:
            continue
        try:
            shape_of(parts, limits)
            taken.add(kind)
        except Unsuited:
            assert kind not in TRIED_ON_GPU or "GELU" in name
    assert taken == TRIED_ON_GPU & set(transformers.CONFIG_MAPPING.keys())


@pytest.mark.parametrize("kind", ["gemma2", "gpt_neox", "smollm3"])
def test_the_gpus_step_says_which_options_it_lacks(kind):
    hf = packed(kind)[0].half()
    parts = parts_of(hf)
    missing = options_of(parts) - model_shape.LIMITS.options
    if not missing:
        pytest.skip("it computes them")
    with pytest.raises(Unsuited) as caught:
        shape_of(parts, replace(model_shape.LIMITS, head_dims=()))
    assert all(OPTIONS[each] in str(caught.value) for each in missing)
    assert not has_gpu_step({"model_type": kind})


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_bigcode"])
def test_no_text_is_longer_than_the_learned_positions(kind):
    hf, twin = packed(kind)
    stepper = CpuStepper(parts_of(hf), 1000, 1)
    memory = stepper.begin()
    ids = (IDS * 7)[:256]
    with torch.inference_mode():
        last = stepper.prefill(memory, ids)
        assert off(last, twin(torch.tensor([ids])).logits[:, -1]) < 1e-3
        with pytest.raises(BadParameter, match="would have 257 tokens; the model has positions for 256"):
            stepper.step(memory, 5)
    assert memory.length == 256
    stepper.close()


def vector(width):
    return Norm(torch.ones(width), None, 1e-5)


def in_layer(**change):
    return lambda parts: replace(parts, layers=(parts.layers[0], replace(parts.layers[1], **change), *parts.layers[2:]))


def in_latent(**change):
    return lambda parts: in_layer(latent=replace(parts.layers[1].latent, **change))(parts)


def in_options(**change):
    return lambda parts: replace(parts, options=replace(parts.options, **change))


@pytest.mark.parametrize(("kind", "alter", "says"), [
    ("gemma2", in_layer(attended_norm=vector(63)), "norms that are not as wide as the residual"),
    ("gemma2", in_layer(inner_norm=None), "norms in some layers only"),
    ("gemma2", in_options(score_cap=float("inf")), "scales or caps that are no numbers"),
    ("gemma2", in_options(logits_cap=-1.0), "scales or caps that are no numbers"),
    ("gemma2", in_options(parallel=True), "side by side with norms of what they give"),
    ("gemma2", in_options(activation="mish"), "options that are not known"),
    ("gemma3_text", in_layer(rotary=2), "layers whose rotary positions are not there"),
    ("olmo2", in_layer(q_norm=vector(32)), "not as wide as all heads"),
    ("stablelm", lambda parts: replace(parts, norm=Norm(torch.ones(64), torch.ones(63), 1e-5)), "not as wide as the residual"),
    ("stablelm", lambda parts: replace(parts, norm=Norm(torch.ones(64), None, 1e-2)), "different epsilons"),
    ("cohere plus", in_layer(k_norm=vector((3, 16))), "not as wide as a head"),
    ("gpt_neox", in_layer(qkv_columns=torch.arange(191)), "an order of queries, keys and values"),
    ("gpt_neox", in_layer(qkv_columns=torch.zeros(192, dtype=torch.int64)), "an order of queries, keys and values"),
    ("gptj", in_layer(qkv_columns=torch.arange(192).flip(0)), "an order of queries, keys and values"),
    ("gpt_neox", in_layer(gate_up=(nn.Linear(64, 192),)), "gate and up are not as wide"),
    ("opt", lambda parts: replace(parts, positions=parts.positions[:, :32]), "learned positions that are not as wide"),
    ("opt", lambda parts: replace(parts, positions=parts.positions[:0]), "learned positions that are not as wide"),
    ("bloom", lambda parts: replace(parts, alibi=replace(parts.alibi, slopes=torch.ones(5))), "one for each head"),
    ("bloom", lambda parts: replace(parts, embedding_norm=vector(95)), "not as wide as the residual"),
    ("llama", in_layer(sinks=torch.zeros(4)), "sinks in some layers only"),
    ("gpt_oss", in_layer(sinks=torch.zeros(5)), "one for each head"),
    ("gpt_oss", in_options(gate_limit=float("nan")), "scales or caps that are no numbers"),
    ("llama4_text", lambda parts: replace(parts, temperature=None), "a temperature of the queries"),
    ("llama4_text", in_layer(window=4, chunk=8), "attention in chunks and a window"),
    ("llama4_text", in_layer(k_norm=None), "norms of queries or of keys only"),
    ("deepseek_v3", in_layer(latent=None), "layers of different sizes"),
    ("deepseek_v3", in_latent(fixed=4), "latent vectors of different sizes"),
    ("deepseek_v3", in_latent(norm=vector(16)), "norms with different epsilons"),
    ("deepseek_v3", in_latent(queries_norm=None), "norms with different epsilons"),
    ("deepseek_v3", in_latent(keys_values=nn.Linear(16, 97, bias=False)), "whose sizes are not those of the heads"),
    ("deepseek_v3", in_latent(queries_columns=torch.zeros(64, dtype=torch.int64)), "an order of queries, keys and values"),
    ("deepseek_v3", in_latent(keys_values=nn.Linear(16, 96)), "a latent vector with a bias"),
])  # fmt: skip
def test_tensors_of_every_kind_are_compared_before_a_step_is_built(kind, alter, says):
    kind, changes = VARIANTS[kind]
    if kind not in transformers.CONFIG_MAPPING or (transformers.__version__ < "5" and kind in DENSE_IN_4):
        pytest.skip("this transformers cannot make such a model")
    hf, _twin = packed(kind, changes)
    parts = parts_of(hf)
    assert shape_of(parts, cpu_step.LIMITS).layers == 4
    with pytest.raises(Unsuited, match=says):
        CpuStepper(alter(parts), 64, 1)
    assert all(each.qweight.numel() for each in parts.linears() if isinstance(each, GPTQLinear)), "nothing was taken"
