"""Tokens/s of transformers' `generate` on a loaded model, against the engine: `python benchmarks/generate_rate.py FOLDER`.

Greedy, with the model card's sampling and with min_p, 257 tokens after a prompt of 512, guesses off. Beside the loop of
tokens that the model is given (sampling_loop.py) also transformers' own, in turns; each figure is the median of the rounds.
"""

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import script

script.register()

import torch  # noqa: E402

from gptq_webui.core.chat import Step  # noqa: E402
from gptq_webui.core.models import LocalModel  # noqa: E402
from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.loaders.transformers.transformers_loader import TransformersLoader, TransformersOptions  # noqa: E402

PROMPT, TOKENS = 512, 257
MODEL_CARD: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the engine, of transformers
    "greedy": ({"temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}, {"do_sample": False}),
    "model card": (MODEL_CARD, {"do_sample": True, **MODEL_CARD}),
    "min_p": (
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.0},
        {"do_sample": True, "top_k": 0, "min_p": 0.05},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    loaded = TransformersLoader().load(
        LocalModel.read(options.folder), TransformersOptions(context_tokens=1024, guesses="off"), lambda *_: None
    )
    loop = loaded._stepper._patch
    ids = torch.randint(300, loaded.hf.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = torch.tensor([ids], device=loaded.hf.device)

    def engine(sampling: dict[str, Any]) -> float:
        params = GenerationParams(max_new_tokens=TOKENS, seed=1, ignore_eos=True, **sampling)
        times = [time.perf_counter() for each in loaded.generate(ids, params, threading.Event()) if isinstance(each, Step)]
        return (len(times) - 1) / (times[-1] - times[0])

    def seconds(tokens: int, settings: dict[str, Any]) -> float:
        began = time.perf_counter()
        loaded.hf.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **settings)
        return time.perf_counter() - began

    for name, (sampling, settings) in KINDS.items():
        rates: dict[str, list[float]] = {"engine": [], "transformers' loop": [], "our loop": []}
        for at in range(options.rounds + 1):  # the first compiles, records and is not counted
            found = {"engine": engine(sampling)}
            for own, kind in ((False, "transformers' loop"), (True, "our loop")):
                loop._own_loop = own
                found[kind] = (TOKENS - 1) / (seconds(TOKENS, settings) - seconds(1, settings))
            for kind, rate in found.items():
                rates[kind] += [rate] * bool(at)
        middle = {kind: statistics.median(each) for kind, each in rates.items()}
        print(
            f"{name}: " + ", ".join(f"{kind} {rate:.1f} ({rate / middle['engine']:.3f})" for kind, rate in middle.items()),
            flush=True,
        )
    loaded.close()


if __name__ == "__main__":
    main()
