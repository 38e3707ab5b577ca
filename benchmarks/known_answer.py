"""A folder whose answer is known, for benchmarks of guesses: token i is followed by token i + 1."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def teach(folder: Path) -> None:
    """Change a folder that make_checkpoint wrote. Its layers add next to nothing, and are computed all the same."""
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(("o_proj.scales", "down_proj.scales")):
            tensor.mul_(0.001)
    embedding = torch.nn.functional.normalize(torch.randn(state["lm_head.weight"].shape), dim=1)
    state["model.embed_tokens.weight"] = (embedding * 128).half()  # of 32 layers beside it, each adds a thousandth
    state["lm_head.weight"] = (embedding.roll(1, 0) * 2).half()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
