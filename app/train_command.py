"""`gptq-webui train`: a LoRA adapter out of a file of conversations. Progress goes to stderr, the folder's name to stdout."""

import argparse
import time
from typing import Any

from ..core.units import format_duration
from ..engine.layer_clock import LayerClock
from ..engine.train_job import TrainJob, curve, folder_for, run
from ..gptq.training_recipe import Recipe
from .engine_commands import make_engine
from .evaluate_command import model_of
from .exit_codes import INTERRUPTED
from .quantize_command import say

_BARS = " ▁▂▃▄▅▆▇█"
_EVERY_S = 5.0  # between two lines


def train(options: argparse.Namespace) -> int:
    """Train the adapter. Ctrl+C stops; the same command goes on."""
    engine = make_engine(options)
    model = model_of(engine, options.model)
    data = options.data.expanduser().absolute()
    recipe = Recipe(
        options.rank,
        options.alpha,
        options.dropout,
        tuple(each.strip() for each in options.targets.split(",") if each.strip()),
        options.learning_rate,
        options.epochs,
        options.batch,
        seed=options.seed,
    )
    output = folder_for(model, options.name or "", data)
    job = TrainJob(model, data, output, recipe, options.length, options.save_every)
    try:
        print(run(job, _Lines(), say))
    except KeyboardInterrupt:
        say("Stopped. The last step is kept; the same command continues from there.")
        return INTERRUPTED
    say(f"With {model.name} loaded, the page lists it for each conversation; over the API it is {model.name}:{output.name}.")
    return 0


class _Lines:
    """A line every few seconds: the step, its loss, the losses so far as bars, and the time left."""

    def __init__(self) -> None:
        self._clock, self._said_s = LayerClock(), 0.0

    def __call__(self, done: Any) -> None:
        left_s = self._clock.left_s(done.step - 1, done.count, resumed=done.resumed)
        if left_s is None:
            say(f"Steps 1 to {done.step} were made by an earlier run.")
            return
        now_s = time.monotonic()
        if now_s - self._said_s < _EVERY_S and done.step < done.count:
            return
        self._said_s = now_s
        say(f"Step {done.step} of {done.count}: loss {done.losses[-1]:.3f} {_bars(done.losses)} {format_duration(left_s)} left")


def _bars(losses: Any) -> str:
    means = curve(losses, 24)
    most = max(means)
    return "".join(_BARS[min(8, max(1, round(8 * each / most)))] for each in means) if most > 0 else ""
