"""`gptq-webui quantize`: GPTQ folders out of a 16-bit model. Progress goes to stderr, the names of the folders to stdout."""

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..core.errors import LoadCancelled
from ..core.model_ref import ModelRef
from ..core.models import LocalModel
from ..core.quantize_config import QuantizeConfig
from ..core.units import format_duration
from ..engine.engine import Engine
from ..engine.quantize_job import USUAL_BRANCHES, QuantizeJob, parse_branch, run
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
    job = QuantizeJob(source, output, list(dict.fromkeys(branches)), options.dataset, options.seq_len, options.samples)
    try:
        folders = run(job, _Progress(), _say)
    except KeyboardInterrupt:
        _say("Stopped. Finished layers are kept; the same command continues from there.")
        return INTERRUPTED
    for folder in folders:
        print(folder)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Progress:
    """One line for each layer: its error in every branch, and the time left."""

    def __init__(self) -> None:
        self._made, self._last_s, self._spent_s = 0, time.monotonic(), 0.0

    def __call__(self, done: Any) -> None:
        now_s = time.monotonic()
        took_s, self._last_s = now_s - self._last_s, now_s
        line = f"Layer {done.index + 1} of {done.count}"
        if done.resumed:
            _say(f"{line}: made by an earlier run")
            return
        if self._made or done.count == 1:  # reading the model is in the time of the first layer
            self._spent_s += took_s
        self._made += 1
        per_layer_s = self._spent_s / (self._made - 1) if self._made > 1 else took_s
        left = format_duration(per_layer_s * (done.count - done.index - 1))
        errors = ", ".join(f"{name} {error:.3%}" for name, error in done.errors.items())
        _say(f"{line}: error {errors}; {left} left")


def _source(engine: Engine, name: str) -> LocalModel:
    """A folder, a model of the library, or a repository, which is downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return LocalModel.read(folder.absolute())
    if name in [each.name for each in engine.library.models()]:
        return engine.library.get(name)
    plan = engine.library.plan(ModelRef.parse(name), any_kind=True)
    _say(plan.summary)
    bars, cancel = Bars(), threading.Event()
    try:
        for progress in engine.library.fetch(plan, cancel):
            bars.show(progress)
    except KeyboardInterrupt:
        cancel.set()
        raise LoadCancelled("Stopped. What arrived is kept; the same command continues from there.") from None
    finally:
        bars.end()
    return LocalModel.read(plan.folder)
