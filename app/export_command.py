"""`gptq-webui export`: a folder in 16 bits, an adapter merged, or plain GPTQ. The name of the folder goes to stdout."""

import argparse
import sys

from ..engine.model_export import export
from .engine_commands import make_engine
from .evaluate_command import model_of


def write(options: argparse.Namespace) -> int:
    """Write the folder and print where it is."""
    engine = make_engine(options)
    model = model_of(engine, options.model)
    adapter = options.adapter.expanduser().absolute() if options.adapter else None
    name = f"{model.name}{f'-{adapter.name}' if adapter else ''}-{'16bit' if options.form == '16bit' else 'GPTQ'}"
    output = options.output.expanduser().absolute() if options.output else engine.library.roots[0] / name
    print(export(model, options.form, output, adapter, lambda text: print(text, file=sys.stderr, flush=True)))
    return 0
