"""Makes GPTQ folders with this project and with GPTQModel: same 16-bit model, text, samples and settings, one after the other.

    python benchmarks/quantize_beside.py FOLDER --gptqmodel VENV/bin/python --work EMPTY_FOLDER

Each run is a process of its own, whose time and peak memory count from its start to its end (imports included). Then both folders
are measured against the 16-bit model on other text, by `gptq-webui evaluate` (its logits are kept in the work folder: 6 GB for
SmolLM2). The processor computes everything.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# GPTQModel 7.6.0 does not start on two cores: it makes one worker for them and asks for two.
_PEER = """
import json, os, sys
cores = os.cpu_count()
os.cpu_count = lambda: max(3, cores)
from gptqmodel import GPTQModel, QuantizeConfig
source, output, samples, bits, group, damp = sys.argv[1:]
ids = json.load(open(samples))
config = QuantizeConfig(bits=int(bits), group_size=int(group), desc_act=True, sym=True, damp_percent=float(damp), device="cpu",
                        offload_to_disk=False)
model = GPTQModel.load(source, config)
model.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids], batch_size=1)
model.save(output)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a 16-bit model")
    parser.add_argument("--gptqmodel", type=Path, required=True, help="a Python that can import gptqmodel")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--settings", nargs="+", default=["4:128", "4:32", "3:128", "8:128"], help="bits:group")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768, help="of the other text: 4,096 leave perplexities 2% of chance")
    parser.add_argument("--damp", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each program")
    options = parser.parse_args()
    options.folder, options.gptqmodel, options.work = (
        each.absolute() for each in (options.folder, options.gptqmodel, options.work)
    )
    options.work.mkdir(parents=True, exist_ok=True)
    text, samples = _texts(options)
    logits = options.work / "logits"
    _evaluate(options.folder, "--keep", logits, "--tokens", options.tokens, "--window", 512)
    for each in options.settings:
        bits, group = each.split(":")
        branch = f"gptq-{bits}bit-{group}g-actorder_True"
        ours, theirs = options.work / f"ours-{each}", options.work / f"gptqmodel-{each}"
        common = ["--damp", str(options.damp), "--seq-len", str(options.seq_len), "--samples", str(options.samples)]
        arguments = ["quantize", options.folder, "--branches", branch, "--dataset", text, *common, "--output", ours]
        runs = {
            "ours": _run([sys.executable, ROOT / "script.py", *arguments], options.work, options.threads),
            "gptqmodel": _run(
                [options.gptqmodel, "-c", _PEER, options.folder, theirs, samples, bits, group, str(options.damp)],
                options.work,
                options.threads,
                {"PYTHONPATH": ""},
            ),
        }
        folders = {"ours": next(ours.glob("*GPTQ_*"), ours), "gptqmodel": theirs}
        for name, (code, took_s, peak_bytes, said) in runs.items():
            row: dict[str, Any] = {"maker": name, "bits": bits, "group": group, "seconds": round(took_s, 1)}
            row["peak_gb"] = round(peak_bytes / 1e9, 2)
            row |= _quality(folders[name], logits) if code == 0 else {"failed": said[-600:]}
            print(json.dumps(row), flush=True)


def _texts(options: argparse.Namespace) -> tuple[Path, Path]:
    """(a text file, the ids of its samples as JSON): Python's manual, as calibration begins with it."""
    from transformers import AutoTokenizer

    sys.path.insert(0, str(ROOT.parent))
    from gptq_webui.core.models import LocalModel
    from gptq_webui.engine.calibration_text import samples_of
    from gptq_webui.engine.demo_calibration import manual

    text, samples = options.work / "text.txt", options.work / "samples.json"
    text.write_text("\n\n".join(manual()), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    found, _words = samples_of(str(text), LocalModel.read(options.folder), tokenizer, options.seq_len, options.samples, print)
    samples.write_text(json.dumps(found))
    print(json.dumps({"samples": len(found), "tokens": options.seq_len, "cores": os.cpu_count()}), flush=True)
    return text, samples


def _run(command: list[Any], work: Path, threads: int, environment: dict[str, str] | None = None) -> tuple[int, float, int, str]:
    """(exit code, seconds, largest resident size in bytes, the end of what it said). gptqmodel leaves logs in `work`."""
    began = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
    child = subprocess.Popen([str(each) for each in command], env=env, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert child.stdout is not None
    said = child.stdout.read().decode(errors="replace")
    _pid, status, usage = os.wait4(child.pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss * 1024, said


def _quality(folder: Path, logits: Path) -> dict[str, float]:
    found = _evaluate(folder, "--against", logits)
    return {
        "perplexity": round(found["perplexity"], 4),
        "original": round(found["against_perplexity"], 4),
        "kl": round(found["difference"]["kl"], 5),
        "same_top": round(found["difference"]["same_top"], 4),
    }


def _evaluate(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "script.py"), "evaluate", *map(str, arguments), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


if __name__ == "__main__":
    main()
