"""`gptq-webui quantize`: GPTQ folders out of a 16-bit model. Progress goes to stderr, the names of the folders to stdout."""

import argparse
import sys
import threading
from typing import Any

from ..core.errors import LoadCancelled
from ..core.models import LocalModel
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_duration
from ..engine.engine import Engine
from ..engine.layer_clock import LayerClock
from ..engine.quantize_job import USUAL_BRANCHES, QuantizeJob, parse_branch, run, usual_sample_tokens
from ..engine.quantize_source import find_source
from .engine_commands import make_engine
from .exit_codes import INTERRUPTED
from .progress_bars import Bars


def quantize(options: argparse.Namespace) -> int:
    """Make the folders. Ctrl+C stops; the same command goes on."""
    engine = make_engine(options)
    base = QuantizeConfig(
        options.bits, options.group_size, options.act_order, not options.asymmetric, options.format, damp_percent=options.damp
    )
    names = USUAL_BRANCHES if options.branches == "all" else (options.branches or "").split(",")
    branches = [parse_branch(name, base) for name in names if name.strip()] or [base]
    source = _source(engine, options.source)
    output = (options.output or engine.library.roots[0]).expanduser().absolute()
    wanted = list(dict.fromkeys(branches))
    tokens = usual_sample_tokens(source) if options.seq_len is None else options.seq_len
    job = QuantizeJob(
        source, output, wanted, options.dataset, tokens, options.samples, options.measure, options.lm_head, options.leave
    )
    try:
        folders = run(job, LayerLines(), say, alone=True)
    except KeyboardInterrupt:
        say("Stopped. Finished layers are kept; the same command continues from there.")
        return INTERRUPTED
    for folder in folders:
        print(folder)
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class LayerLines:
    """One line for each layer: its error in every branch, and the time left."""

    def __init__(self) -> None:
        self._clock = LayerClock()

    def __call__(self, done: Any) -> None:
        left_s = self._clock.left_s(done.index, done.count, resumed=done.resumed)
        line = f"Layer {done.index + 1} of {done.count}{f' ({done.name})' if done.name else ''}"
        if left_s is None:
            say(f"{line}: made by an earlier run")
            return
        errors = ", ".join(f"{name} {error:.3%}" for name, error in done.errors.items())
        say(f"{line}: error {errors}; {format_duration(left_s)} left")


def _source(engine: Engine, name: str) -> LocalModel:
    bars, cancel = Bars(), threading.Event()
    try:
        return find_source(engine, name, say, bars.show, cancel)
    except KeyboardInterrupt:
        cancel.set()
        raise LoadCancelled("Stopped. What arrived is kept; the same command continues from there.") from None
    finally:
        bars.end()
