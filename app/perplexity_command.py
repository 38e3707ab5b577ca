"""`gptq-webui perplexity`: how well a model predicts texts, by the kernel that answers use. The figure goes to stdout."""

import argparse
import dataclasses
import json
import threading
from pathlib import Path

from ..engine.dataset_file import text_of
from ..engine.evaluation import default_text
from ..engine.perplexity import TOKENS
from .engine_commands import StatusLine, load_model, load_options, loading_line, make_engine
from .evaluate_command import model_of


def perplexity(options: argparse.Namespace) -> int:
    """Load, measure, and print the line or (--json) the numbers. Raises GptqWebuiError."""
    files: list[Path] = list(options.files)
    if options.demo and options.model:
        files, options.model = [Path(options.model), *files], None
    text = "".join(text_of(each.expanduser(), "the text") for each in files) if files else default_text()
    name = ", ".join(each.name for each in files) or "Python's manual"
    tokens = options.tokens or (None if files else TOKENS)
    engine = make_engine(options)
    line, cancel = StatusLine(), threading.Event()
    engine.slot.watchers.append(lambda status: line.show(loading_line(status)))
    try:
        if options.model and Path(options.model).expanduser().is_dir():
            engine.load_folder(model_of(engine, options.model), options.loader, load_options(options))
        else:
            load_model(engine, options)
        from ..engine.perplexity import measure

        found = measure(
            engine, text, name, cancel, window=options.window, stride=options.stride, tokens=tokens, progress=line.show
        )
        line.end()
        print(json.dumps(dataclasses.asdict(found)) if options.json and found is not None else found)
        return 0
    finally:
        cancel.set()
        line.end()
        engine.unload()
