"""Tokens per second of one answer, ours against what else is installed: `python benchmarks/cpu_decode.py FOLDER [--gguf FILE]`.

All are opened first, then take turns, so that other load on the machine is shared; the result is the median of the
rounds and the best, and the ratio of ours to each of them round by round.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import bootstrap

bootstrap.register()

import peers  # noqa: E402
import torch  # noqa: E402

from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.gptq.guessing import Guesser  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="peers whose name contains this, and ours")
    parser.add_argument("--no-guesses", action="store_true", help="every token by a pass of its own: what the kernels take")
    parser.add_argument("--json", type=Path, help="write everything here")
    asked = parser.parse_args()
    if asked.no_guesses:
        setattr(Guesser, "guess", lambda self, costs: [])  # noqa: B010, mypy refuses the assignment
    model = LocalModel.read(asked.folder)
    ids = torch.randint(100, 1000, (asked.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    context = max(peers.CONTEXT, asked.prompt + asked.tokens + 64)
    opened = {}
    for at, peer in enumerate(peers.peers_for(model, asked.device, asked.gguf, context)):
        if at and asked.only not in peer.name:
            continue
        try:
            run = peer.open()
            run(ids, 4)
            opened[peer.name] = (peer, run)
        except Exception as error:
            print(f"{peer.name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in opened}
    firsts: dict[str, list[float]] = {name: [] for name in opened}
    loads = []
    for _ in range(asked.rounds):
        for name, (_peer, run) in opened.items():
            time.sleep(0.3)  # threads of the one before may still be spinning
            loads.append(os.getloadavg()[0])
            came = run(ids, asked.tokens)
            rates[name].append((len(came) - 1) / (came[-1] - came[0]))
            firsts[name].append(came[0])
    print(
        f"{model.name}, {asked.device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads), prompt "
        f"{asked.prompt}, {asked.tokens} tokens, {asked.rounds} rounds; load average {min(loads):.1f} to {max(loads):.1f}"
    )
    mine = next(iter(rates.values()))
    stepper = getattr(next(iter(opened.values()))[1], "stepper", None)
    read_bytes = getattr(stepper, "size_bytes", 0)
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(mine, found, strict=True))
        median = statistics.median(found)
        firsts_of_ours = next(iter(firsts.values()))
        sooner = statistics.median(b / a for a, b in zip(firsts_of_ours, firsts[name], strict=True))
        speed = f", {read_bytes * median / 1e9:.1f} GB/s of weights" if found is mine and read_bytes else ""
        print(
            f"  {name:52} {median:7.1f} tokens/s (best {max(found):.1f}), first after {statistics.median(firsts[name]):.3f} s, "
            f"ours is {ratio:.2f}x, its first {sooner:.2f}x as soon{speed}  [{opened[name][0].versions}]"
        )
    if asked.json:
        asked.json.write_text(
            json.dumps({"model": model.name, "device": asked.device, "load": loads, "tokens_per_s": rates, "first_s": firsts})
        )


if __name__ == "__main__":
    main()
