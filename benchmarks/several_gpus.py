"""One model on one GPU, split by layers over several, and computed by them together: `python benchmarks/several_gpus.py FOLDER`.

Each placement runs in a process of its own; every figure is the median of three runs in it. Tokens per second of one answer
after a prompt of 512 tokens, the time to its first token, the load, and the memory of each GPU. A 70B shape to measure by:
`python benchmarks/make_checkpoint.py FOLDER --shape llama-70b`. `--device cpu` compares one process with several on a processor,
which only shows that the script works.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import script  # noqa: E402

script.register()

from gptq_webui.core.chat import Finish, Step  # noqa: E402
from gptq_webui.core.errors import GptqWebuiError  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.engine.engine import Engine  # noqa: E402
from gptq_webui.engine.settings import Settings  # noqa: E402
from gptq_webui.hub.library import Library  # noqa: E402
from gptq_webui.loaders.machine.gpus import gpus  # noqa: E402

TIMES = 3
_SPARE_GB = 2.0  # of the last GPU of a split, beside its half or quarter of the weights


def placements(folder: Path, gpu_counts: list[int], device: str) -> dict[str, dict[str, Any]]:
    """Name -> options of the loader transformers."""
    found: dict[str, dict[str, Any]] = {"one": {"device": device, "tensor_parallel": 1}}
    size_gb = LocalModel.read(folder).size_bytes / 1e9
    for count in gpu_counts:
        if device == "cuda":
            shares = [f"{size_gb / count + _SPARE_GB:.1f}"] * count
            found[f"split by layers, {count} GPUs"] = {"device": device, "gpu_memory": ",".join(shares), "tensor_parallel": 1}
        found[f"tensor parallel, {count}"] = {"device": device, "tensor_parallel": count}
    return {name: {**options, "guesses": "off"} for name, options in found.items()}


def measure(folder: Path, options: dict[str, Any], prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The figures of one placement, in this process."""
    before = [each.free_bytes for each in gpus()]
    with tempfile.TemporaryDirectory() as home:
        engine = Engine(Library([folder.parent]), Settings(Path(home) / "settings.json"))
        began = time.perf_counter()
        try:
            loaded: Any = engine.load(folder.name, "transformers", {"context_tokens": prompt_tokens + new_tokens + 64, **options})
        except GptqWebuiError as error:
            return {"refused": str(error)}
        figures: dict[str, Any] = {"load_s": time.perf_counter() - began, "kernel": loaded.kernel, "notes": list(loaded.notes)}
        ids = [1 + at * 7919 % 2000 for at in range(prompt_tokens)]
        rates, firsts = [], []
        for run in range(TIMES + 1):
            loaded._prefix.clear()
            params = GenerationParams(max_new_tokens=new_tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
            times, begun = [], time.perf_counter()
            for event in loaded.generate(ids, params, threading.Event()):
                if isinstance(event, Step):
                    times.append(time.perf_counter())
                assert not isinstance(event, Finish) or event.reason == "length"
            if run:  # the first warms up
                firsts.append(times[0] - begun)
                rates.append((len(times) - 1) / (times[-1] - times[0]))
        figures |= {"tokens_per_s": statistics.median(rates), "first_token_s": statistics.median(firsts)}
        figures["gpu_bytes"] = [was - each.free_bytes for was, each in zip(before, gpus(), strict=True)]
        loaded.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", default="2,4", help="numbers of GPUs, with commas; more than there are, are left out")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # options as JSON: measured in this process
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.folder.resolve(), json.loads(given.one), given.prompt, given.tokens)))
        return
    there = len(gpus())
    counts = [each for each in map(int, given.gpus.split(",")) if given.device == "cpu" or each <= there]
    if given.device == "cuda" and not counts:
        sys.exit(f"This machine has {there} GPUs: there is nothing to compare.")
    found: dict[str, Any] = {}
    for name, options in placements(given.folder, counts, given.device).items():
        command = [sys.executable, __file__, str(given.folder), "--one", json.dumps(options)]
        command += ["--prompt", str(given.prompt), "--tokens", str(given.tokens)]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = run.stdout.strip().splitlines()
        figures: dict[str, Any] = (
            json.loads(lines[-1]) if run.returncode == 0 and lines else {"refused": f"exit {run.returncode}"}
        )
        found[name] = figures
        if "refused" in figures:
            print(f"{name:28} {figures['refused']}", flush=True)
            continue
        base = found["one"].get("tokens_per_s")
        ratio = f" ({figures['tokens_per_s'] / base:.2f}x of one)" if base else ""
        memory = ", ".join(f"{each / 1e9:.1f} GB" for each in figures["gpu_bytes"])
        print(
            f"{name:28} {figures['tokens_per_s']:.2f} tokens/s{ratio}, first token {figures['first_token_s'] * 1000:.0f} ms, "
            f"load {figures['load_s']:.1f} s{', ' + memory if memory else ''} [{figures['kernel']}]",
            flush=True,
        )
        for note in figures["notes"]:
            print(f"    {note}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
