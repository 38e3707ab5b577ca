"""Makes a GPTQ folder of any model's shape with random weights: `python benchmarks/make_checkpoint.py DIR --shape mistral-7b`.

It has everything a loader asks for and says nothing sensible: for speed, memory and load times, where no
model can be downloaded. Layers that share their input share their act-order, as AutoGPTQ writes them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "num_hidden_layers": 32, "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_key_value_heads": 40,
                  "num_hidden_layers": 40, "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
                  "num_hidden_layers": 80, "vocab_size": 32000, "max_position_embeddings": 4096},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
                      "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 48,
                      "vocab_size": 32000, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                      "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 32768, "rope_theta": 1e6},
    "tiny-mixture": {"model_type": "qwen3_moe", "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2,
                     "vocab_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
                     "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 2048},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 2048},
}  # fmt: skip


def packed(k: int, n: int, bits: int, group_size: int, rows: torch.Tensor | None, device: str) -> dict[str, torch.Tensor]:
    """A random symmetric layer in AutoGPTQ's layout; `rows` is the act-order, a permutation of the inputs."""
    groups = 1 if group_size == -1 else -(-k // group_size)
    size = k if group_size == -1 else group_size
    stored = sum(((1 << (bits - 1)) - 1) << (bits * at) for at in range(32 // bits))  # bits 2, 4 and 8
    zero = stored - (1 << 32) if stored >> 31 else stored
    g_idx = torch.arange(k) // size
    return {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (k * bits // 32, n), dtype=torch.int32, device=device).cpu(),
        "qzeros": torch.full((groups, n * bits // 32), zero, dtype=torch.int32),
        "scales": ((torch.rand(groups, n, device=device) + 0.5) * 3 / 2**bits / k**0.5).half().cpu(),
        "g_idx": (g_idx if rows is None else g_idx[rows.argsort()]).int(),
    }


def make(
    folder: Path, shape: str, bits: int = 4, group_size: int = 128, act_order: bool = True, seed: int = 0, layers: int = 0
) -> Path:
    """Write the folder; returns it. An existing one is left as it is. `layers`: how many of the shape's; 0 for all."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    hidden, inner, vocabulary = facts["hidden_size"], facts["intermediate_size"], facts["vocab_size"]
    head_dim = facts.get("head_dim", hidden // facts["num_attention_heads"])
    heads, kv = (facts[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    experts, own = facts.get("num_experts", 0), facts.get("moe_intermediate_size", 0)
    state = {
        "model.embed_tokens.weight": (torch.randn(vocabulary, hidden) * 0.02).half(),
        "model.norm.weight": torch.ones(hidden).half(),
        "lm_head.weight": (torch.randn(vocabulary, hidden) * 0.02).half(),
    }
    for at in range(facts["num_hidden_layers"]):
        name = f"model.layers.{at}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{name}.{norm}.weight"] = torch.ones(hidden).half()
        if experts:
            state |= {f"{name}.self_attn.{each}_norm.weight": torch.ones(head_dim).half() for each in "qk"}
            state[f"{name}.mlp.gate.weight"] = (torch.randn(experts, hidden) * 0.02).half()
        shared: dict[str, torch.Tensor] = {}
        layers_of = [
            ("self_attn.q_proj", hidden, heads, "qkv"), ("self_attn.k_proj", hidden, kv, "qkv"),
            ("self_attn.v_proj", hidden, kv, "qkv"), ("self_attn.o_proj", heads, hidden, "o"),
        ]  # fmt: skip
        for block, width in [(f"mlp.experts.{each}", own) for each in range(experts)] or [("mlp", inner)]:
            layers_of += [(f"{block}.gate_proj", hidden, width, block), (f"{block}.up_proj", hidden, width, block)]
            layers_of.append((f"{block}.down_proj", width, hidden, f"{block} down"))
        for layer, k, n, of in layers_of:
            rows = shared.setdefault(of, torch.randperm(k)) if act_order else None
            state |= {f"{name}.{layer}.{part}": t for part, t in packed(k, n, bits, group_size, rows, device).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model_type = facts.get("model_type", "mistral" if shape.startswith("mistral") else "llama")
    architecture = {"mistral": "Mistral", "llama": "Llama", "qwen3_moe": "Qwen3Moe"}[model_type] + "ForCausalLM"
    quantize = {"bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True, "damp_percent": 0.1}
    config = {
        **facts, "model_type": model_type, "architectures": [architecture], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "torch_dtype": "float16", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "sliding_window": None,
        "quantization_config": {**quantize, "quant_method": "gptq"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "quantize_config.json").write_text(json.dumps(quantize, indent=1))
    write_tokenizer(folder, vocabulary)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Bytes, and as many words without a meaning as the vocabulary has left."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"w{at}" for at in range(len(names), vocabulary)]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(names[:2])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


_write_tokenizer = write_tokenizer  # its name before, by which scripts beside this project import it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--no-act-order", action="store_true")
    parser.add_argument("--layers", type=int, default=0, help="so many of the shape's")
    given = parser.parse_args()
    made = make(given.folder, given.shape, given.bits, given.group_size, not given.no_act_order, layers=given.layers)
    print(made)


if __name__ == "__main__":
    main()
