"""How long one decoder layer of a 7B takes to quantise, and what GPU memory that needs: Mistral-7B's shape with random weights.

    python benchmarks/quantize_layer.py [--samples 128 --tokens 2048 --layers 2]
    python benchmarks/quantize_layer.py --gptqmodel PYTHON      the same with GPTQModel, in a process of its own

The first layer's time includes what a process does once. A model of 7B has 32 such layers; the memory does not grow with them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq_webui.core.quantize_config import QuantizeConfig
from gptq_webui.gptq.layerwise_quantize import quantize_layers

# Seconds are those of quantize() alone: reading and saving the model are left out, as they are of ours.
_PEER = """
import json, os, sys, time
cores = os.cpu_count()
os.cpu_count = lambda: max(3, cores)
import torch
from gptqmodel import GPTQModel, QuantizeConfig
source, samples, batch = sys.argv[1:]
ids = json.load(open(samples))
device = "cuda" if torch.cuda.is_available() else "cpu"
config = QuantizeConfig(bits=4, group_size=128, desc_act=True, sym=True, damp_percent=0.1, device=device, offload_to_disk=False)
model = GPTQModel.load(source, config)
if device == "cuda":
    torch.cuda.reset_peak_memory_stats()
began = time.monotonic()
model.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids], batch_size=int(batch))
took = time.monotonic() - began
memory = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device == "cuda" else (0, 0)
print("MEASURED " + json.dumps([took, *memory]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("samples", 128), ("tokens", 2048), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gptqmodel", help="a Python that can import gptqmodel")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="samples that GPTQModel computes at once")
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
    start = began = time.monotonic()

    def report(done: object) -> None:
        nonlocal began
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        print(f"layer {done.index + 1}: {now - began:.1f} s, error {done.errors['4bit-128g']:.4%}", flush=True)  # type: ignore[attr-defined]
        began = now

    with tempfile.TemporaryDirectory() as work:
        quantize_layers(model, texts, branches, Path(work), device, report, alone=True)
    print(f"ours: {time.monotonic() - start:.1f} s for {options.layers} layers", flush=True)
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        print(f"peak: {allocated / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved", flush=True)
        torch.cuda.empty_cache()
    if options.gptqmodel:
        _beside(model, texts, options)


def _beside(model: Any, texts: list[list[int]], options: argparse.Namespace) -> None:
    from make_checkpoint import write_tokenizer

    with tempfile.TemporaryDirectory() as place:
        source, samples = Path(place) / "model", Path(place) / "samples.json"
        model.save_pretrained(source)
        write_tokenizer(source, 1024)
        samples.write_text(json.dumps(texts))
        for batch in options.batches:
            command = [options.gptqmodel, "-c", _PEER, str(source), str(samples), str(batch)]
            found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            line = next((each for each in found.stdout.splitlines() if each.startswith("MEASURED ")), "")
            if not line:
                print(f"gptqmodel failed:\n{found.stdout[-3000:]}")
                continue
            took_s, allocated, reserved = json.loads(line.removeprefix("MEASURED "))
            print(
                f"gptqmodel, batch of {batch}: {took_s:.1f} s for {options.layers} layers; "
                f"peak {allocated / 1e9:.2f} GB allocated, {reserved / 1e9:.2f} GB reserved",
                flush=True,
            )


if __name__ == "__main__":
    main()
