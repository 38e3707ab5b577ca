"""`gptq-webui upload`: GPTQ folders to the branches of a repository. What is sent goes to stderr, the address to stdout."""

import argparse
import json
import sys

from ..hub.upload import branches_of, upload
from .engine_commands import make_engine
from .evaluate_command import model_of


def send(options: argparse.Namespace) -> int:
    """Upload the folders. Ctrl+C stops; the same command sends what is missing."""
    engine = make_engine(options)
    branches = branches_of([model_of(engine, each).folder for each in options.models])
    address = upload(
        engine.library.hub,
        options.to,
        branches,
        private=options.private,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps({"address": address, "branches": [each.name for each in branches]}) if options.json else address)
    return 0
