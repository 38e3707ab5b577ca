"""Writes tiny models with gptqmodel and auto-round, and what these programs compute of them once they are read again.

    python tests/writer_programs.py write FOLDER
    python tests/writer_programs.py reload FOLDER
    python tests/writer_programs.py reload_compressed FOLDER

It runs in an environment of its own, with these programs and transformers (CONTRIBUTING.md); tests/test_files_of_writers.py
starts it. All steps go on with what FOLDER lacks; FOLDER/jobs.json says what is to be made. Writing leaves a folder for each
job, or NAME.error.txt; reloading, in a process that has not quantised anything, leaves NAME.logits.safetensors, the logits of
`IDS`. Files of compressed-tensors are read in a process of their own: auto-round takes the names of a mixture's experts from
transformers once it has opened a file of its own format (auto_round/modeling/unfused_moe), and a later reload of DeepSeek-V3 has
random experts.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

_CORES = os.cpu_count() or 1
IDS = [5 + 17 * at % 250 for at in range(24)]
TEXTS, LENGTH = 8, 64


def _dense(folder: Path, job: dict) -> Path:
    """A 16-bit model with a tokenizer; one for every job that starts from the same."""
    import torch
    from every_architecture import tiny_model

    import tiny

    changes, dtype = job.get("changes", {}), job.get("dtype", "float16")
    name = "-".join([job["kind"], dtype, *(f"{each}={value}" for each, value in sorted(changes.items()))])
    found = folder / "dense" / "".join(each if each.isalnum() else "-" for each in name)
    if not found.exists():
        model = tiny_model(job["kind"], **changes).to(getattr(torch, dtype))
        for own, parameter in model.named_parameters():
            if own.endswith("bias"):  # zeros would hide one that is lost
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(found)
        tiny.write_tokenizer(found)
    return found


def _texts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 260, (LENGTH,), generator=generator).tolist() for _ in range(TEXTS)]


def _write_gptqmodel(source: Path, target: Path, settings: dict) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(**settings, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(source), config)
    model.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in _texts()], batch_size=1)
    model.save(str(target))


def _write_auto_round(source: Path, target: Path, settings: dict) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = dict(settings)
    form = settings.pop("format")
    data = [
        {"input_ids": torch.tensor([each]), "attention_mask": torch.ones(1, len(each), dtype=torch.long)} for each in _texts()
    ]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rounds = AutoRound(
        model, AutoTokenizer.from_pretrained(source), dataset=data, nsamples=TEXTS, seqlen=LENGTH, batch_size=1,
        **{"iters": 0, "device_map": "cpu", **settings},
    )  # fmt: skip
    made = target.with_name(f"{target.name}.made")
    rounds.quantize_and_save(str(made), format=form)
    found = next(each.parent for each in made.rglob("config.json"))  # it may add a folder of its own
    found.rename(target)
    shutil.rmtree(made, ignore_errors=True)


def _reloaded(target: Path, job: dict):
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from transformers import AutoModelForCausalLM

    dtype = torch.float16  # that of the scales: bfloat16 would round them
    form = job["settings"].get("format")
    if job["program"] == "gptqmodel" or form in ("auto_gptq", "auto_awq"):  # the formats of other programs
        backend = BACKEND.AWQ_TORCH if form == "auto_awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(str(target), device="cpu", backend=backend, dtype=dtype).model
    else:
        import auto_round  # noqa: F401 (transformers learns its formats)

        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, device_map="cpu")
    torch.nn.Module.float(model)  # transformers' own refuses it for quantised models
    for module in model.modules():
        if "awq" in type(module).__name__.lower():  # its kernels compute in 16 bits
            _in_32_bits(module)
    return model.eval()


def _in_32_bits(module) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.bits, module.group_size).float()
    bias = 0 if module.bias is None else module.bias.float()
    module.forward = lambda x: x @ weight + bias


def main() -> None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the programs compile their dequantisation
    os.cpu_count = lambda: max(3, _CORES)  # gptqmodel 7.6 does not start on two cores: it makes one worker and asks for two
    sys.path.insert(0, str(Path(__file__).parent))
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    step, folder = sys.argv[1], Path(sys.argv[2])
    for job in json.loads((folder / "jobs.json").read_text()):
        name = job["name"]
        if step != "write" and (step == "reload_compressed") != (job["settings"].get("format") == "llm_compressor"):
            continue
        target, begun, error = folder / name, folder / f"{name}.{step}", folder / f"{name}.error.txt"
        if begun.exists() or error.exists():
            continue  # done, or the process ended at it
        begun.touch()
        try:
            if step == "write":
                globals()[f"_write_{job['program']}"](_dense(folder, job), target, job["settings"])
            else:
                with torch.inference_mode():
                    logits = _reloaded(target, job)(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float()
                save_file({"logits": logits.contiguous()}, folder / f"{name}.logits.safetensors")
        except Exception:
            error.write_text(f"{step}\n{traceback.format_exc()}")
        print("DONE", name, flush=True)


if __name__ == "__main__":
    main()
