"""Tokens per second on the processor of random models, one for each family: `python benchmarks/families.py [FAMILY …]`.

Each is packed in 4 bits (groups of 128, act-order) and computed by our step; against transformers' generate on the model that is
not quantised, in fp32 and in bf16. One thread each, in one process, in turns; the ratio is to the faster of the two, round by
round.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bootstrap

bootstrap.register()

import torch  # noqa: E402
from random_models import random_layer  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from gptq_webui.gptq.experts import PackedExperts, is_dense_experts  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402

_LLAMA = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
_WIDE = {**_LLAMA, "intermediate_size": 4096}
_EXPERTS = {"num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 352, "norm_topk_prob": True}
_LATENT = {
    **_LLAMA, "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    "v_head_dim": 64, "n_routed_experts": 32, "num_experts_per_tok": 6, "moe_intermediate_size": 352, "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
del _LATENT["head_dim"]
_OLDER = {"vocab_size": 32000, "n_embd": 1024, "n_layer": 12, "n_head": 16, "n_positions": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA, "gemma": _LLAMA, "gemma2": {**_LLAMA, "query_pre_attn_scalar": 64, "sliding_window": 1024},
    "gemma3_text": {**_LLAMA, "query_pre_attn_scalar": 64}, "phi": {**_WIDE, "num_key_value_heads": 16},
    "falcon": {**{name: size for name, size in _WIDE.items() if name != "head_dim"},  # it computes that itself
               "new_decoder_architecture": True, "num_kv_heads": 4},
    "gpt_neox": _WIDE,
    "gptj": {**_OLDER, "rotary_dim": 64}, "gpt2": _OLDER, "opt": {**_WIDE, "ffn_dim": 4096, "word_embed_proj_dim": 1024},
    "bloom": {"vocab_size": 32000, "hidden_size": 1024, "n_layer": 12, "n_head": 16},
    "mpt": {"vocab_size": 32000, "d_model": 1024, "n_layers": 12, "n_heads": 16}, "gpt_bigcode": _OLDER, "starcoder2": _WIDE,
    "stablelm": _LLAMA, "cohere": _LLAMA, "cohere2": _LLAMA, "olmo": _LLAMA, "olmo2": _LLAMA, "olmo3": _LLAMA,
    "granite": _LLAMA, "glm": _LLAMA, "glm4": _LLAMA, "ernie4_5": _LLAMA, "nemotron": _WIDE, "seed_oss": _LLAMA,
    "hunyuan_v1_dense": _LLAMA, "exaone4": _LLAMA, "smollm3": _LLAMA, "mixtral": {**_LLAMA, "num_local_experts": 8},
    "qwen2_moe": {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 1408}, "qwen3_moe": {**_LLAMA, **_EXPERTS},
    "olmoe": {**_LLAMA, "num_experts": 32, "num_experts_per_tok": 8, "intermediate_size": 352},
    "gpt_oss": {**_LLAMA, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 704, "sliding_window": 128},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "llama4_text": {**_LLAMA, "num_local_experts": 16, "num_experts_per_tok": 1, "intermediate_size": 1408,
                    "intermediate_size_mlp": 2816},
}  # fmt: skip


def random_model(kind: str) -> Any:
    """Its numbers are those of 16 bits, as files hold them: what is not packed takes no more for us either."""
    config = AutoConfig.for_model(kind, **SHAPES[kind])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).float().eval()


def packed(model: Any) -> Any:
    """The same architecture with random packed layers; what is not packed is the model's own."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        conv = type(module).__name__ == "Conv1D"
        blocks = any(part.isdigit() for part in name.split("."))
        if not (isinstance(module, nn.Linear) or conv) or not blocks or name.endswith(("shared_expert_gate", "router")):
            continue
        k, n = module.weight.shape if conv else module.weight.shape[::-1]
        rows = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        layer = random_layer(k, n, 4, 128, sym=True, rows=rows, bias=module.bias is not None, device="cpu")
        owner, _dot, last = name.rpartition(".")
        setattr(found.get_submodule(owner), last, layer)
    for name, module in list(found.named_modules()):
        if is_dense_experts(module):
            owner, _dot, last = name.rpartition(".")
            setattr(found.get_submodule(owner), last, packed_experts(module))
    return found


def packed_experts(dense: Any) -> PackedExperts:
    """Random packed experts in the place of those that transformers 5 holds as 3-D weights."""
    found = PackedExperts(dense)
    turned = dense.gate_up_proj.shape[2] == 2 * dense.down_proj.shape[1]  # [experts, in, out]
    hidden, inner = dense.down_proj.shape[1:][:: -1 if turned else 1]
    bias = hasattr(dense, "gate_up_proj_bias")
    for at in range(found.num_experts):
        for role, k, n in (("gate_proj", hidden, inner), ("up_proj", hidden, inner), ("down_proj", inner, hidden)):
            rows = torch.randperm(k, generator=torch.Generator().manual_seed(at))
            layer = random_layer(k, n, 4, 32 if k % 128 else 128, sym=True, rows=rows, bias=bias, device="cpu")
            found.get_submodule(str(at)).add_module(role, layer)
    return found


def measured(run: Callable[[], int]) -> float:
    """Tokens per second."""
    began = time.perf_counter()
    return run() / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for kind in given.families:
        dense = random_model(kind)
        size = sum(each.numel() for each in dense.parameters())
        stepper, note = stepper_for(packed(dense), 512)
        peers = {"fp32": dense, "bf16": copy.deepcopy(dense).bfloat16()}
        ids = torch.randint(5, 30000, (1, 32), generator=torch.Generator().manual_seed(0))

        def ours(stepper: Any = stepper, ids: Any = ids) -> int:
            memory = stepper.begin()
            logits = stepper.prefill(memory, ids[0].tolist())
            for _ in range(given.tokens - 1):
                logits = stepper.step(memory, int(logits[0].argmax()))
            return given.tokens

        def theirs(model: Any, ids: Any = ids) -> int:
            out = model.generate(ids, max_new_tokens=given.tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
            return out.shape[1] - ids.shape[1]

        mine: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in peers}
        with torch.inference_mode():
            stepper.step(stepper.begin(), 5)
            for _ in range(given.rounds):
                mine.append(measured(ours))
                for name, model in peers.items():
                    rates[name].append(measured(partial(theirs, model)))
        best = [max(each) for each in zip(*rates.values(), strict=True)]
        ratio = statistics.median(a / b for a, b in zip(mine, best, strict=True))
        shown = ", ".join(f"transformers {name} {statistics.median(each):.1f}" for name, each in rates.items())
        print(
            f"{kind:18} {size / 1e6:4.0f}M  {stepper.kernel} {statistics.median(mine):6.1f} tokens/s, {shown}: "
            f"{ratio:.1f}x  {note}",
            flush=True,
        )
        stepper.close()


if __name__ == "__main__":
    main()
