"""`gptq-webui evaluate`: perplexity, and how near a model is to another. The figures go to stdout."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from ..core.models import LocalModel
from ..engine.engine import Engine
from ..engine.evaluation import evaluate as measure
from .engine_commands import make_engine


def evaluate(options: argparse.Namespace) -> int:
    """Measure, and print the sentences or (--json) the numbers."""
    engine = make_engine(options)
    model = model_of(engine, options.model)
    against = model_of(engine, options.against) if options.against else None
    text = options.text.expanduser() if options.text else None
    found = measure(model, against, text, options.window, options.tokens, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(dataclasses.asdict(found)) if options.json else found.text)
    return 0


def model_of(engine: Engine, name: str) -> LocalModel:
    """A folder, or a model of the library."""
    folder = Path(name).expanduser()
    return LocalModel.read(folder.absolute()) if folder.is_dir() else engine.library.get(name)
