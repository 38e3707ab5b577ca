"""Tiny random models that see pictures, packed as GPTQ programs pack them: the language model alone."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import tiny

_TEXT = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
_SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
KINDS = {
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_scaling": _ROPE, "rope_parameters": _ROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        "image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_scaling": _ROPE, "rope_parameters": _ROPE},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        "image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_scaling": _ROPE, "rope_parameters": _ROPE},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263,
    },
    "qwen3_vl_moe": {
        "text_config": {**_TEXT, "rope_scaling": _ROPE, "rope_parameters": _ROPE, "num_experts": 5, "num_experts_per_tok": 2,
                        "moe_intermediate_size": 96, "norm_topk_prob": True},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                          "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        "image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_SIGHT, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 260, "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 260, "image_seq_length": 4,
    },
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
        "image_token_index": 260, "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
    },
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {**_SIGHT, "model_type": "siglip_vision_model", "image_size": 56},
        "mm_tokens_per_image": 4, "image_token_index": 260, "boi_token_index": 262, "eoi_token_index": 263,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_SIGHT, "image_size": 56},
        "image_token_id": 260, "scale_factor": 2,
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SIGHT, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 260, "image_seq_length": 1, "downsample_ratio": 0.5,
    },
}  # fmt: skip
_PACKED = re.compile(r"^(?!.*(visual|vision|projector|connector|tower)).*layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$")


def write(folder: Path, kind: str, bits: int = 4, group_size: int = 32, seed: int = 0, act_order: bool = True):
    """A packed folder; returns its dense twin."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    config = AutoConfig.for_model(kind, **KINDS[kind])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.1)
    dense = folder.with_name(f"{folder.name}-dense")
    model.half().save_pretrained(dense)
    state = load_file(dense / "model.safetensors")
    packed = {}
    for name, weight in state.items():
        if _PACKED.match(name):
            rows, columns = weight.shape[::-1]
            tensors, state[name] = tiny.random_layer(rows, columns, bits, group_size, act_order=act_order, generator=generator)
            packed |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in tensors.items()}
        elif name.endswith(".mlp.experts.gate_up_proj"):  # of a mixture: each expert's own layers
            prefix = name.removesuffix(".gate_up_proj")
            down = state[f"{prefix}.down_proj"]
            hidden, inner = _TEXT["hidden_size"], KINDS[kind]["text_config"]["moe_intermediate_size"]
            for at in range(weight.shape[0]):
                own = {}
                for part, rows, columns in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
                    tensors, own[part] = tiny.random_layer(rows, columns, bits, group_size, generator=generator)
                    packed |= {f"{prefix}.{at}.{part}_proj.{name}": tensor for name, tensor in tensors.items()}
                both = torch.cat([own["gate"], own["up"]])
                weight[at] = both if weight.shape[1] == 2 * inner else both.T
                down[at] = own["down"] if down.shape[1] == hidden else own["down"].T
        elif not name.endswith(".mlp.experts.down_proj"):
            packed[name] = weight
    assert len(packed) > len(state)
    save_file(
        {name: tensor.float().contiguous() for name, tensor in state.items()}, dense / "model.safetensors", {"format": "pt"}
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(dense / "config.json", folder)
    quantize = {"bits": bits, "group_size": group_size, "desc_act": act_order, "sym": True, "damp_percent": 0.1}
    (folder / "quantize_config.json").write_text(json.dumps(quantize))
    return AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.float32).eval()
