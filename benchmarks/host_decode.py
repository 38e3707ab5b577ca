"""Tokens/s of a model inside text-generation-webui, against our Engine: `python benchmarks/host_decode.py HOST MODEL`.

HOST is a folder of text-generation-webui, MODEL a GPTQ folder; the environment has what both need. In one process, in turns:
the host's own `generate_reply` (its samplers, greedy and with min_p 0.05), a bare `generate` of transformers as a program
calls it, and an answer of our Engine to the same prompt. Each answer has 200 tokens, none ends earlier; the last lines give
medians and the fastest, each with its ratio to the Engine's answer of the same sampling.
"""

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Here is a long story about a lighthouse, its keeper, and the ships that passed it in the winter of 1874."
TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("host", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = given.model.absolute()
    sys.path[:0] = [str(given.host.absolute()), str(ROOT)]
    os.chdir(given.host)
    sys.argv = ["server.py", "--cpu", "--model-dir", str(model.parent)]
    import script

    script.register()
    import modules.models as models
    import modules.shared as shared
    from modules.presets import load_preset
    from modules.text_generation import generate_reply

    from gptq_webui.extension import bridge

    shared.generation_lock = threading.Lock()  # as the host's server.py does
    made = bridge.patch()
    shared.model, shared.tokenizer = models.load_model(model.name)
    shared.model_name = model.name
    loaded = made.engine.ready()
    print(f"kernel {loaded.kernel}; notes: {' '.join(loaded.notes) or 'none'}")
    ids = shared.tokenizer.encode(PROMPT)

    def in_host(preset: str | None, **changes: Any) -> int:
        state = {**shared.settings, **load_preset(preset), "max_new_tokens": TOKENS, "seed": 1, "stream": True, **changes}
        state |= {
            "ban_eos_token": True,
            "add_bos_token": False,
            "custom_stopping_strings": "",
            "max_tokens_second": 0,
            "auto_max_new_tokens": False,
        }
        text = ""
        for text in generate_reply(PROMPT, state):  # noqa: B007 (the last one)
            pass
        return len(shared.tokenizer.encode(text, add_special_tokens=False))

    def bare() -> int:
        import torch

        with torch.no_grad():
            found = shared.model.generate(
                torch.tensor([ids]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
            )
        return int(found.shape[1]) - len(ids)

    def ours(**sampling: Any) -> int:
        from gptq_webui.core.chat import Token
        from gptq_webui.core.params import GenerationParams

        params = GenerationParams(max_new_tokens=TOKENS, ignore_eos=True, seed=1, repetition_penalty=1, **sampling)
        return sum(isinstance(each, Token) for each in made.engine.complete(PROMPT, params, threading.Event()))

    sides: dict[str, Callable[[], int]] = {
        "Engine, min_p": lambda: ours(temperature=1, top_k=0, top_p=1, min_p=0.05),
        "Engine, greedy": lambda: ours(temperature=0),
        "host, greedy": lambda: in_host(None, do_sample=False),
        "host, min_p": lambda: in_host(None, do_sample=True, min_p=0.05),
        "generate": bare,
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(given.rounds + 1):  # the first compiles and is not counted
        for name, side in sides.items():
            begun = time.perf_counter()
            count = side()
            rate = count / (time.perf_counter() - begun)
            if at:
                found[name].append(rate)
                print(f"{name:14} {count} tokens, {rate:.1f} tokens/s", flush=True)
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    for name, found_of in (("medians", middle), ("fastest", {name: max(rates) for name, rates in found.items()})):
        print(
            f"{name}: " + "; ".join(f"{side} {rate:.1f} ({rate / found_of[beside(side)]:.2f})" for side, rate in found_of.items())
        )


def beside(side: str) -> str:
    """The Engine's answer of the same sampling."""
    return "Engine, min_p" if "min_p" in side else "Engine, greedy"


if __name__ == "__main__":
    main()
