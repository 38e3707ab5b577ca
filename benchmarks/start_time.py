"""Process start to first token of `gptq-webui ask`, in fresh processes: seconds by the clock, and of the processor.

    python benchmarks/start_time.py FOLDER [--against CHECKOUT] [--rounds N]

FOLDER is a model's folder. `--against` names another checkout of this project, for example one of the commit before: both
are started in turns, so that a busy machine is busy for both. "imports alone" is a Python that imports torch and
transformers' model code and does nothing else: no loader that uses them starts sooner. The first round is not counted: it
compiles what is not compiled yet and reads the files into memory.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parents[1]
IMPORTS = "import torch, transformers.modeling_utils; print('x', flush=True)"
QUESTION = "What is the capital of France?"


def first_output(command: Sequence[str]) -> tuple[float, float]:
    """(seconds by the clock, seconds of the processor) until the process writes its first letter. Raises SystemExit."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        letter = process.stdout.read(1)
        clock_s = time.perf_counter() - began
        times = psutil.Process(process.pid).cpu_times()
        process.stdout.read()
    if not letter or process.returncode:
        raise SystemExit(f"{' '.join(command)} wrote nothing or failed (exit code {process.returncode}).")
    return clock_s, times.user + times.system


def ask(checkout: Path, folder: Path) -> list[str]:
    script = [sys.executable, str(checkout / "script.py"), "ask", QUESTION, "--models-dir", str(folder.parent)]
    return [*script, "--model", folder.name, "--temperature", "0", "--max-new-tokens", "2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder.resolve()
    sides = {"this checkout": ask(HERE, folder), "imports alone": [sys.executable, "-c", IMPORTS]}
    if options.against:
        sides["the other checkout"] = ask(options.against.resolve(), folder)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for at in range(options.rounds + 1):
        for name, command in sides.items():
            measured = first_output(command)
            if at:
                found[name].append(measured)
                print(f"round {at}: {name} {measured[0]:.2f} s, processor {measured[1]:.2f} s", file=sys.stderr, flush=True)
    print("| until the first token | clock, s | processor, s |\n|---|---|---|")
    for name, rounds in found.items():
        print("| " + " | ".join([name, *(f"{statistics.median(column):.2f}" for column in zip(*rounds, strict=True))]) + " |")


if __name__ == "__main__":
    main()
