"""A copy of TheBloke/Mistral-7B-Instruct-v0.2-GPTQ in small: its card, its six branches, its sizes; weights of holes.

The weights are sparse files: real safetensors headers with the real shapes, and no data behind them.
"""

# ruff: noqa: E501
import json
import struct
from pathlib import Path
from typing import Any

from hub_server import Blob, HubServer

REPO = "TheBloke/Mistral-7B-Instruct-v0.2-GPTQ"
# branch, bits, group, size in bytes, description: as in the card
BRANCHES = (
    ("main", 4, 128, 4_160_000_000, "4-bit, with Act Order and group size 128g. Uses even less VRAM than 64g, but with slightly lower accuracy."),
    ("gptq-4bit-32g-actorder_True", 4, 32, 4_570_000_000, "4-bit, with Act Order and group size 32g. Gives highest possible inference quality, with maximum VRAM usage."),
    ("gptq-4bit-64g-actorder_True", 4, 64, 4_290_000_000, "4-bit, with Act Order and group size 64g. Uses less VRAM than 32g, but with slightly lower accuracy."),
    ("gptq-8bit--1g-actorder_True", 8, -1, 7_520_000_000, "8-bit, with Act Order. No group size, to lower VRAM requirements."),
    ("gptq-8bit-128g-actorder_True", 8, 128, 7_680_000_000, "8-bit, with group size 128g for higher inference quality and with Act Order for even higher accuracy."),
    ("gptq-8bit-32g-actorder_True", 8, 32, 8_170_000_000, "8-bit, with group size 32g and Act Order for maximum inference quality."),
)  # fmt: skip
CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
}  # fmt: skip
_LAYER = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024),
          "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336),
          "mlp.down_proj": (14336, 4096)}  # fmt: skip


def model_card(repo: str = REPO) -> bytes:
    rows = "".join(
        f"| [{branch}](https://huggingface.co/{repo}/tree/{branch}) | {bits} | {'None' if group < 0 else group} | Yes | 0.1 | "
        f"[VMware Open Instruct](https://huggingface.co/datasets/VMware/open-instruct/viewer/) | 4096 | {size / 1e9:.2f} GB | "
        f"{'Yes' if bits == 4 else 'No'} | {text} | \n"
        for branch, bits, group, size, text in BRANCHES
    )
    return (
        "---\nbase_model: mistralai/Mistral-7B-Instruct-v0.2\ninference: false\nlicense: apache-2.0\nmodel_creator: Mistral AI_\n"
        "model_name: Mistral 7B Instruct v0.2\nmodel_type: mistral\nprompt_template: '<s>[INST] {prompt} [/INST]\n\n  '\n"
        "quantized_by: TheBloke\n---\n\n# Mistral 7B Instruct v0.2 - GPTQ\n\n"
        "<!-- README_GPTQ.md-provided-files start -->\n## Provided files, and GPTQ parameters\n\n"
        "| Branch | Bits | GS | Act Order | Damp % | GPTQ Dataset | Seq Len | Size | ExLlama | Desc |\n"
        "| ------ | ---- | -- | --------- | ------ | ------------ | ------- | ---- | ------- | ---- |\n" + rows + "\nText.\n"
    ).encode()


def write_weights(path: Path, bits: int, group: int, size_bytes: int) -> None:
    """A header as safetensors writes it (I32 first, then F16), then a hole up to the size."""
    wide: dict[str, Any] = {}
    half: dict[str, Any] = {}
    for layer in range(32):
        for name, (rows, columns) in _LAYER.items():
            groups = 1 if group == -1 else rows // group
            base = f"model.layers.{layer}.{name}"
            wide[f"{base}.g_idx"] = ("I32", [rows])
            wide[f"{base}.qweight"] = ("I32", [rows * bits // 32, columns])
            wide[f"{base}.qzeros"] = ("I32", [groups, columns * bits // 32])
            half[f"{base}.scales"] = ("F16", [groups, columns])
    header, at = {}, 0
    for name, (dtype, shape) in {**dict(sorted(wide.items())), **dict(sorted(half.items()))}.items():
        count = 4 if dtype == "I32" else 2
        for each in shape:
            count *= each
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(size_bytes)


def settings(bits: int, group: int) -> dict[str, Any]:
    return {"bits": bits, "group_size": group, "damp_percent": 0.1, "desc_act": True, "static_groups": False, "sym": True,
            "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}  # fmt: skip


def add(server: HubServer, folder: Path, repo: str = REPO, more: int = 0) -> None:
    """Put the six branches on the server, and `more` copies of the last under other names. Nothing of the holes is hashed."""
    readme = model_card(repo)
    every = [*BRANCHES, *((f"more-{at}", *BRANCHES[-1][1:]) for at in range(more))]
    for branch, bits, group, size, _text in every:
        path = folder / f"{bits}-{group}.safetensors"
        if not path.exists():
            write_weights(path, bits, group, size)
        quantize = settings(bits, group)
        files = {
            "README.md": readme,
            "config.json": json.dumps({**CONFIG, "quantization_config": {**quantize, "quant_method": "gptq"}}).encode(),
            "quantize_config.json": json.dumps(quantize).encode(),
            "tokenizer.json": b"{}" * 40_000,
            "generation_config.json": b"{}",
        }
        server.add(repo, files, branch)
        commit = server.repos[repo].branches[branch]
        weights = Blob(None, path, size, f"{bits:032x}{group & 0xFFFF:032x}", "0" * 40, True)
        server.repos[repo].commits[commit]["model.safetensors"] = weights
