"""`gptq-webui export`: a folder in 16 bits, an adapter merged, or plain GPTQ. The name of the folder goes to stdout."""

import argparse

from ..engine.model_export import Requantise, export, usual_folder
from .engine_commands import make_engine
from .evaluate_command import model_of
from .exit_codes import INTERRUPTED
from .quantize_command import LayerLines, say


def write(options: argparse.Namespace) -> int:
    """Write the folder and print where it is. Ctrl+C stops; where weights are quantised again, the same command goes on."""
    engine = make_engine(options)
    model = model_of(engine, options.model)
    adapter = options.adapter.expanduser().absolute() if options.adapter else None
    output = options.output.expanduser().absolute() if options.output else usual_folder(engine, model, options.form, adapter)
    again = Requantise(options.dataset, options.seq_len, options.samples, report=LayerLines(), alone=True)
    try:
        print(export(model, options.form, output, adapter, say, zeros=options.format or "", again=again))
    except KeyboardInterrupt:
        say("Stopped. Finished layers are kept; the same command continues from there.")
        return INTERRUPTED
    return 0
