"""The demo model as transformers has it, read from its GGUF file: an fp32 Llama and its tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_BOS, _EOS = "<|im_start|>", "<|im_end|>"

# The names of https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py, for a Llama.
_TENSORS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """The Llama in a GGUF file, in fp32, and its tokenizer.

    transformers' own reader (gguf_file=) parses the file five times, which takes 18 s for this one,
    and its tokenizer does not split digits.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)

    def setting(name: str) -> Any:
        field = reader.get_field(name)
        return None if field is None else field.contents()

    heads, kv_heads = setting("llama.attention.head_count"), setting("llama.attention.head_count_kv")
    values: dict[str, Any] = {
        "vocab_size": len(setting("tokenizer.ggml.tokens")),
        "hidden_size": setting("llama.embedding_length"),
        "intermediate_size": setting("llama.feed_forward_length"),
        "num_hidden_layers": setting("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": setting("llama.context_length"),
        "rms_norm_eps": float(f"{setting('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
        "rope_theta": setting("llama.rope.freq_base"),
        "bos_token_id": setting("tokenizer.ggml.bos_token_id"),
        "eos_token_id": setting("tokenizer.ggml.eos_token_id"),
        "pad_token_id": setting("tokenizer.ggml.padding_token_id"),
        "tie_word_embeddings": True,
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # a copy, so that nothing holds the file open
        *block, kind, _weight = tensor.name.split(".")  # "blk.3.attn_q.weight", "token_embd.weight"
        if kind in ("attn_q", "attn_k"):  # llama.cpp stores the two halves of a rotary head interleaved
            rows = weight.view(heads if kind == "attn_q" else kv_heads, -1, 2, weight.shape[1])
            weight = rows.transpose(1, 2).reshape(weight.shape)
        state[".".join(["model", *(["layers", block[1]] if block else []), _TENSORS[kind], "weight"])] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False), _tokenizer(setting)


def _tokenizer(setting: Callable[[str], Any]) -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = setting("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in setting("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, setting("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=_BOS,
        eos_token=_EOS,
        unk_token="<|endoftext|>",
        pad_token=_EOS,
        model_max_length=setting("llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = setting("tokenizer.chat_template")
    return tokenizer


def write_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write the tokenizer's files by hand: transformers 4 cannot read what transformers 5 saves."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS,
        "eos_token": _EOS,
        "unk_token": "<|endoftext|>",
        "pad_token": _EOS,
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
