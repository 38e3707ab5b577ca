"""Training an adapter over a packed model of Mistral-7B's shape (random weights): seconds a step, memory, falling loss.

    python benchmarks/train_gpu.py [--shape mistral-7b --steps 12 --batch 4 --length 1024]

The texts are a few sentences again and again, so that a few steps show a lower loss. Then the same training is stopped in the
middle and goes on: the losses of both are printed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from make_checkpoint import SHAPES, make

from gptq_webui.core.models import LocalModel
from gptq_webui.engine.train_job import TrainJob, run
from gptq_webui.gptq.training_recipe import Recipe, StepDone


class _Stop(Exception):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    for name, default in (("steps", 12), ("batch", 4), ("length", 1024), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = make(Path(place) / options.shape, options.shape)
        data = Path(place) / "texts.jsonl"
        text = "The ferry leaves the old harbour at nine, and the rain has not stopped since Sunday. "
        texts = [(f"{at}. " + text * 999)[: options.length - 2] for at in range(options.steps * options.batch)]
        data.write_text("\n".join(json.dumps({"text": each}) for each in texts))
        recipe = Recipe(options.rank, 2 * options.rank, epochs=1, batch=options.batch, learning_rate=1e-3)
        whole = _train(TrainJob(LocalModel.read(folder), data, folder.parent / "whole", recipe, options.length), options.steps)
        cut = TrainJob(LocalModel.read(folder), data, folder.parent / "cut", recipe, options.length)
        _train(cut, options.steps // 2)
        again = _train(cut, options.steps)
        print(f"losses      {' '.join(f'{each:.3f}' for each in whole)}")
        print(f"stopped     {' '.join(f'{each:.3f}' for each in again)}")
        worst = max(abs(a - b) for a, b in zip(whole, again, strict=True))
        falls = "falls" if whole[-1] < 0.8 * whole[0] else "does not fall"
        print(f"largest difference between the two: {worst:.2g}; the loss {falls}")


def _train(job: TrainJob, until: int) -> list[float]:
    """Losses of the steps made so far; stops after step `until`."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    losses: list[float] = []
    began = time.monotonic()

    def heard(done: StepDone) -> None:
        nonlocal began
        losses[:] = done.losses
        if not done.resumed:
            times.append(time.monotonic() - began)
        began = time.monotonic()
        if done.step >= until and done.step < done.count:
            raise _Stop

    try:
        run(job, heard, lambda text: print(text, flush=True))
    except _Stop:
        print(f"stopped after step {len(losses)}", flush=True)
    steady = sorted(times[2:]) or times
    memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    middle = steady[len(steady) // 2]
    print(f"{len(times)} steps, {middle:.3f} s a step, first {times[0]:.1f} s, {memory:.2f} GB at most", flush=True)
    return losses


if __name__ == "__main__":
    main()
