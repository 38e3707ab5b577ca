"""`gptq-webui evaluate`: perplexity, and how near a model is to another. The figures go to stdout."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..core.errors import BadParameter
from ..core.models import LocalModel
from ..engine import evaluation
from ..engine.engine import Engine
from .engine_commands import make_engine


def evaluate(options: argparse.Namespace) -> int:
    """Measure, and print the sentences or (--json) the numbers."""
    engine = make_engine(options)
    model = model_of(engine, options.model)
    text = options.text.expanduser() if options.text else None
    if options.keep and options.against:
        raise BadParameter("--keep writes the logits of one model: leave out --against.")
    if options.keep:
        found = evaluation.keep(model, options.keep.expanduser(), text, options.window, options.tokens, _say)
    elif options.against and evaluation.is_stored(stored := Path(options.against).expanduser()):
        found = evaluation.evaluate_stored(model, stored, _say)
    else:
        against = model_of(engine, options.against) if options.against else None
        found = evaluation.evaluate(model, against, text, options.window, options.tokens, _say)
    print(json.dumps(dataclasses.asdict(found)) if options.json else found.text)
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def model_of(engine: Engine, name: str) -> LocalModel:
    """A folder, or a model of the library."""
    folder = Path(name).expanduser()
    return LocalModel.read(folder.absolute()) if folder.is_dir() else engine.library.get(name)
