"""Tiny random GPTQ folders of any architecture, and their dense twins, written from the format alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

_COMMON = {"vocab_size": 288, "max_position_embeddings": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_COMMON, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
_WIDE = {**_COMMON, "hidden_size": 64, "intermediate_size": 128}
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gpt_neox": _WIDE,
    "opt": {**_COMMON, "hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1},
    "gpt2": {"vocab_size": 288, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128},
    "falcon": {**_COMMON, "hidden_size": 64, "multi_query": True, "new_decoder_architecture": False},
    "phi": _WIDE,
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def write_tokenizer(folder: Path, chat_template: str | None = None, bos: bool = True) -> None:
    """A byte-level tokenizer of 260 ids: <s> 0, </s> 1, <|im_start|> 2, <|im_end|> 3, then the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {text: at for at, text in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(values))


def bit_pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers [rows, cols] -> int32 [rows * bits / 32, cols], low bits first: one stream of bits for each column."""
    stream = (values.long()[:, None] >> torch.arange(bits)[:, None] & 1).flatten(0, 1)
    words = (stream[: len(stream) // 32 * 32].unflatten(0, (-1, 32)) << torch.arange(32)[:, None]).sum(1)
    return (words - (words >> 31 << 32)).int()


def random_layer(rows, cols, bits, group_size, *, act_order=False, sym=True, form="gptq", generator=None, permutation=None):
    """(tensors as in a file, dense weight [cols, rows] in fp32)."""
    size = rows if group_size == -1 else group_size
    groups = -(-rows // size)
    g_idx = torch.arange(rows) // size
    if act_order:
        g_idx = g_idx[torch.randperm(rows, generator=generator) if permutation is None else permutation]
    q = torch.randint(0, 2**bits, (rows, cols), generator=generator)
    low = 1 if form == "gptq" else 0
    zeros = torch.randint(low, 2**bits, (groups, cols), generator=generator)
    if sym:
        zeros = torch.full((groups, cols), 2 ** (bits - 1))
    scales = (torch.rand(groups, cols, generator=generator) * 0.02 + 0.01).div(2**bits / 8).half()
    dense = scales.float()[g_idx] * (q - zeros[g_idx]).float()
    stored = zeros - 1 if form == "gptq" else zeros
    tensors = {
        "qweight": bit_pack(q, bits),
        "qzeros": bit_pack(stored.T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    return tensors, dense.T.contiguous()


def dense_model(kind: str, seed: int = 0):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind])
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def packable(model):
    """name -> module of every layer that GPTQ programs quantise: all Linears and Conv1Ds inside the blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and ".".join(name.split(".")[-2:]) not in ("lm_head", "embed_out")
        and any(part.isdigit() for part in name.split("."))
        and not name.endswith(".gate")  # a router of experts stays dense
    }


def write(
    folder: Path,
    kind: str = "llama",
    *,
    bits=4,
    group_size=32,
    act_order=True,
    sym=True,
    form="gptq",
    weights="model",
    settings="quantize_config",
    g_idx=True,
    shards=1,
    seed=0,
    shared_order=False,  # layers of one parent with as many inputs have one act-order, as programs write them
):
    """A packed folder; returns its dense twin, whose weights are the dequantised ones."""
    generator = torch.Generator().manual_seed(seed + 1)
    twin = dense_model(kind, seed)
    layers = packable(twin)
    orders = {}
    tied = twin.config.tie_word_embeddings
    state = {}
    for name, tensor in twin.state_dict().items():
        if name.rpartition(".")[0] in layers and name.endswith(".weight"):
            continue
        if tied and name in ("lm_head.weight", "embed_out.weight"):
            continue
        state[name] = tensor.half().contiguous()
    for name, module in layers.items():
        conv = type(module).__name__ == "Conv1D"
        rows, cols = module.weight.shape if conv else module.weight.shape[::-1]
        order = None
        if shared_order:
            order = orders.setdefault((name.rpartition(".")[0], rows), torch.randperm(rows, generator=generator))
        tensors, dense = random_layer(
            rows, cols, bits, group_size, act_order=act_order, sym=sym, form=form, generator=generator, permutation=order
        )
        if not g_idx:
            del tensors["g_idx"]
        state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        module.weight.data = dense.T.contiguous() if conv else dense
    for name, tensor in twin.state_dict().items():
        if name in state:
            tensor.copy_(state[name].float())
    for name, experts in twin.named_modules():  # transformers 5 holds a mixture's experts as dense 3-D weights
        if getattr(getattr(experts, "gate_up_proj", None), "ndim", 0) != 3:
            continue
        del state[f"{name}.gate_up_proj"], state[f"{name}.down_proj"]
        count, twice, hidden = experts.gate_up_proj.shape
        for at in range(count):
            dense = {}
            for part, (rows, cols) in {
                "w1": (hidden, twice // 2),
                "w2": (twice // 2, hidden),
                "w3": (hidden, twice // 2),
            }.items():
                tensors, dense[part] = random_layer(
                    rows, cols, bits, group_size, act_order=act_order, sym=sym, form=form, generator=generator
                )
                state |= {f"{name}.{at}.{part}.{key}": tensor for key, tensor in tensors.items()}
            experts.gate_up_proj.data[at] = torch.cat([dense["w1"], dense["w3"]])
            experts.down_proj.data[at] = dense["w2"]
    if kind == "mixtral":
        state = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    config = {**twin.config.to_dict(), "architectures": [type(twin).__name__]}
    quantize = {"bits": bits, "group_size": group_size, "desc_act": act_order, "sym": sym, "damp_percent": 0.1}
    if form != "gptq":
        quantize["checkpoint_format"] = form
    if settings == "config":
        config["quantization_config"] = {**quantize, "quant_method": "gptq"}
    else:
        (folder / "quantize_config.json").write_text(json.dumps(quantize))
    (folder / "config.json").write_text(json.dumps(config, default=str))
    names = sorted(state)
    if shards == 1:
        save_file(state, folder / f"{weights}.safetensors", metadata={"format": "pt"})
        return twin
    index = {}
    for at in range(shards):
        part = {name: state[name] for name in names[at::shards]}
        file = f"{weights}-{at + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / f"{weights}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return twin
