"""How long one decoder layer of a 7B takes to quantise, and what GPU memory that needs: Mistral-7B's shape with random weights.

    python benchmarks/quantize_layer.py [--samples 128 --tokens 2048 --layers 2]

The first layer's time includes what a process does once. A model of 7B has 32 such layers; the memory does not grow with them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.gptq.layerwise_quantize import quantize_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 128), ("tokens", 2048), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    config = AutoConfig.for_model(
        "mistral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=1024,
        num_hidden_layers=options.layers, max_position_embeddings=4096, sliding_window=None,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    model = model.cpu()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 1024, (options.tokens,), generator=generator).tolist() for _ in range(options.samples)]
    branches = {"4bit-128g": QuantizeConfig(4, 128, True, True, damp_percent=0.1)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()

    def report(done: object) -> None:
        nonlocal began
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        print(f"layer {done.index + 1}: {now - began:.1f} s, error {done.errors['4bit-128g']:.4%}", flush=True)  # type: ignore[attr-defined]
        began = now

    with tempfile.TemporaryDirectory() as work:
        quantize_layers(model, texts, branches, Path(work), device, report)
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"peak: {allocated / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved")


if __name__ == "__main__":
    main()
