"""Tokens/s of many architectures with random packed weights: `python benchmarks/breadth.py [SHAPE …] [--layers N] [--profile]`.

A model is made from a config of transformers on the GPU, its linear layers packed (4 bits, groups of 128) and filled with
random numbers. It is computed by the stepper that the product chooses. For one row at a context of 512 a line says: time of a
step, tokens/s of a greedy loop, bytes read for a token, their share of a copy's bandwidth, time of a prompt of 512, the error
of the logits against the same model in fp32 and plain PyTorch with `--check` (of the prompt's last token, the largest of eight
steps), and which way it was computed. `gemma2-9b@4` takes four layers. `--tiny` divides the widths, for a machine without a
GPU. `--profile` lists the kernels of a step; ours begin before those in front of them have ended, unless `--apart` is given.
"""

import argparse
import copy
import gc
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import script  # noqa: E402

script.register()

from breadth_shapes import SHAPES, config_of  # noqa: E402
from random_models import random_layer  # noqa: E402

from gptq_webui.gptq.experts import PackedExperts, expert_bias, expert_shape, is_dense_experts  # noqa: E402
from gptq_webui.gptq.gptq_linear import GPTQLinear  # noqa: E402
from gptq_webui.gptq.stepper_choice import stepper_for  # noqa: E402

CONTEXT = 512


def build(name: str, layers: int, tiny: bool, device: str, group: int, vocabulary: int = 0) -> Any:
    """The model with random weights, all linear layers of its blocks packed. `vocabulary`: 0 is the shape's own."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = config_of(name, layers, tiny)
    config.get_text_config(decoder=True).vocab_size = vocabulary or config.get_text_config(decoder=True).vocab_size
    dtype = getattr(torch, SHAPES[name].get("dtype", "float16")) if device == "cuda" else torch.float32
    eager = config.model_type in ("gpt_oss", "mpt", "gpt_neo", "rwkv", "xlstm")
    own = getattr(config, "attn_logit_softcapping", None) is not None or eager
    with torch.device(device), no_init_weights():
        kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = kind.from_config(config, dtype=dtype, attn_implementation="eager" if own else "sdpa")
    model.tie_weights()
    model.eval().requires_grad_(False)
    pack(model, device, group)
    head = model.get_output_embeddings()
    for name, each in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, GPTQLinear) or not each.is_floating_point():
            continue
        if each.dim() == 1:
            if "norm" in name.lower() or "ln_" in name:
                bias = name.endswith("bias")
                each.data.copy_((torch.rand_like(each) - 0.5) * 0.1 + (0.0 if bias else _middle(module)))
            elif name.endswith(("A_log", "dt_bias")):
                each.data.uniform_(0.1, 1.0)
            else:
                each.data.normal_(0, 0.02)
        else:
            each.data.normal_(0, each.shape[-1] ** -0.5 if module is head else 0.02 if each.shape[-1] > 64 else 0.3)
    return model


def _middle(norm: nn.Module) -> float:
    """What the weight of a norm is where it changes nothing."""
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    weight.data.zero_()
    bias: Any = getattr(norm, "bias", None)
    if bias is not None:
        bias.data.zero_()
    try:
        x = torch.randn(4, weight.shape[0], device=weight.device, dtype=weight.dtype)
        return 0.0 if float(norm(x).abs().sum()) else 1.0
    except (TypeError, ValueError):  # of two inputs, or of heads
        return 1.0


def pack(model: nn.Module, device: str, group: int) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        if is_dense_experts(module):
            (inner, hidden), bias = expert_shape(module, "down_proj"), expert_bias(module)
            packed = PackedExperts(module)
            setattr(parent, child, packed)
            module._parameters.clear()
            for at in range(packed.num_experts):
                own = packed.get_submodule(str(at))
                for role, k, n in (*((each, hidden, inner) for each in packed.first), ("down", inner, hidden)):
                    layer = random_layer(k, n, 4, group, sym=True, rows=None, bias=bias, device=device)
                    own.add_module(f"{role}_proj", layer)
        elif isinstance(module, nn.Linear) and module is not head and min(module.weight.shape) >= 32 and "router" not in name:
            if name.endswith(("mlp.gate", "shared_expert_gate")) or module.out_features % 8 or module.in_features % 32:
                continue
            k, n, bias = module.in_features, module.out_features, module.bias is not None
            setattr(parent, child, random_layer(k, n, 4, group, sym=True, rows=None, bias=bias, device=device))
            del module.weight, module.bias
    gc.collect()


def bytes_read(model: Any) -> int:
    """Of one token: the packed layers, of experts only the chosen ones, and what is dense; without embedding and conversation."""
    config = model.config.get_text_config(decoder=True)
    chosen = getattr(config, "num_experts_per_tok", 1) or 1
    of_experts: set[int] = set()
    total = 0.0
    for each in model.modules():
        if isinstance(each, PackedExperts):
            of_experts |= {id(layer) for layer in each.modules() if isinstance(layer, GPTQLinear)}
            size = sum(_size(layer) for layer in each.modules() if isinstance(layer, GPTQLinear))
            total += size * chosen / each.num_experts
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for module in (each for name, each in model.named_modules() if "visual" not in name):
        if isinstance(module, GPTQLinear):
            total += _size(module) if id(module) not in of_experts else 0
        else:
            own = module.parameters(recurse=False)
            total += sum(each.numel() * each.element_size() for each in own if each is not embedding and each is not head)
    return int(total + head.numel() * head.element_size())


def _size(layer: GPTQLinear) -> int:
    return layer.qweight.numel() * 4 + layer.scales.numel() * 2


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a large copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * a.numel() / sorted(times)[len(times) // 2]


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def plain_twin(model: Any) -> Any:
    """The model before its stepper takes it, in fp32 and plain PyTorch."""
    twin = copy.deepcopy(model).float()
    for each in twin.modules():
        if isinstance(each, GPTQLinear):
            each.prepare()
    return twin


@torch.inference_mode()
def measure(name: str, given: argparse.Namespace, bandwidth: float) -> str:
    device = given.device
    torch.manual_seed(0)
    began = time.perf_counter()
    model = build(name, given.layers, given.tiny, device, 32 if given.tiny else SHAPES[name].get("group", 128))
    size, layers = bytes_read(model), model.config.get_text_config(decoder=True).num_hidden_layers
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocabulary, (CONTEXT + 40,), generator=generator).tolist()
    wanted = None
    if given.check:
        twin = plain_twin(model)
        wanted = twin(torch.tensor([ids[: CONTEXT + 8]], device=device)).logits[0, CONTEXT - 1 :].float()
        del twin
        gc.collect()
    built = time.perf_counter() - began
    began = time.perf_counter()
    stepper, note = stepper_for(model, 4096)
    sync(device)
    prepared = time.perf_counter() - began

    prompts = []
    for _ in range(3):
        memory = stepper.begin()
        sync(device)
        began = time.perf_counter()
        logits = stepper.prefill(memory, ids[:CONTEXT])
        sync(device)
        prompts.append(time.perf_counter() - began)
    keys = memory.size_bytes
    errors = []
    found = [logits[0].float().clone()]
    for at in range(8):
        found.append(stepper.step(memory, ids[CONTEXT + at])[0].float().clone())
    if wanted is not None:
        errors = [float((own - twin).norm() / twin.norm()) for own, twin in zip(found, wanted, strict=True)]
        prompted = [stepper.prefill(stepper.begin(), ids[: CONTEXT + at + 1])[0].float() for at in range(8)]
        theirs = [float((own - twin).norm() / twin.norm()) for own, twin in zip(prompted, wanted[1:], strict=True)]
        apart = [float((own - other).norm() / other.norm()) for own, other in zip(found[1:], prompted, strict=True)]
        print(f"  {name}: error of steps", " ".join(f"{each:.1e}" for each in errors[1:]))
        print(f"  {name}: of prompts    ", " ".join(f"{each:.1e}" for each in theirs))
        print(f"  {name}: between them  ", " ".join(f"{each:.1e}" for each in apart))
    steps = 8 if given.tiny else 64
    times = []
    for _ in range(5):
        sync(device)
        began = time.perf_counter()
        for at in range(steps // 4):
            stepper.step(memory, ids[at])
        sync(device)
        times.append((time.perf_counter() - began) / (steps // 4))
    step = sorted(times)[2]
    id, began = int(stepper.step(memory, ids[0])[0].argmax()), time.perf_counter()
    for _ in range(steps):
        id = int(stepper.step(memory, id)[0].argmax())
    rate = steps / (time.perf_counter() - began)
    if given.profile and device == "cuda":
        profile(lambda: stepper.step(memory, 5), given.profile)
    share = (size + keys) / bandwidth / step if bandwidth else 0.0
    error = f" error {errors[0]:.1e}/{max(errors[1:]):.1e}" if errors else ""
    line = (
        f"{name:18} step {step * 1e6:7.0f} us  {rate:6.0f} tokens/s  {(size + keys) / 1e9:5.2f} GB  {share:5.1%} of the limit  "
        f"prompt {min(prompts) * 1e3:6.1f} ms{error}  {layers} layers, built {built:.0f} s, "
        f"prepared {prepared:.0f} s  {stepper.kernel}: {note}"
    )
    stepper.close()
    return line


def profile(run: Any, rows: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    repeats = 4
    run()
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [each for each in found.key_averages() if each.self_device_time_total > 0]
    events.sort(key=lambda each: -each.self_device_time_total)
    count, total = sum(each.count for each in events) / repeats, sum(each.self_device_time_total for each in events) / repeats
    print(f"  {count:.0f} kernels, {total:.0f} us busy")
    for each in events[:rows]:
        name = each.key.replace("at::native::", "").replace("(anonymous namespace)::", "")
        print(f"  {each.self_device_time_total / repeats:8.1f} us {each.count / repeats:6.1f}x  {name[:120]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--layers", type=int, default=0, help="at most so many")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", type=int, nargs="?", const=14, default=0)
    parser.add_argument("--apart", action="store_true", help="no kernel begins before the one in front of it has ended")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="  %(name)s: %(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if given.apart:
        from gptq_webui.gptq.cuda import cuda_driver

        cuda_driver._PDL = 0  # CU_LAUNCH_ATTRIBUTE_IGNORE
    bandwidth = 0.0
    if given.device == "cuda":
        bandwidth = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}", flush=True)
    lines = []
    for name in given.shapes:
        name, _at, layers = name.partition("@")
        own = copy.copy(given)
        own.layers = int(layers or given.layers)
        try:
            lines.append(measure(name, own, bandwidth))
            print(lines[-1], flush=True)
        except Exception:
            print(f"{name} failed\n{traceback.format_exc()[-1500:]}", flush=True)
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
