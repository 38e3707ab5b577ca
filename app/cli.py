"""The command line: `gptq-webui [serve|branches|download|models|…]`. Answers --help without a heavy import."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from .. import __version__
from ..core.errors import DiskFull, GptqWebuiError
from ..core.foreign_errors import of_the_disk
from ..loaders.transformers import quick_imports
from . import access_flags, exit_codes, tgi_flags
from .chat_arguments import add_to as add_chat
from .command_parser import CommandParser, add_json, add_loading, add_models, add_remote, parse
from .download_arguments import add_to as add_download
from .perplexity_arguments import add_to as add_perplexity
from .publish_arguments import add_export, add_upload
from .quantize_arguments import add_to as add_quantize
from .safe_terminal import safe_streams
from .train_arguments import add_to as add_train

_QUIET = {  # a line of these logs would break bars or a chat
    **dict.fromkeys(("download", "verify", "repair", "update"), "gptq_webui.hub"),
    "chat": "gptq_webui",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, as exit_codes.py lists them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with contextlib.nullcontext() if given[:1] == ["host"] else safe_streams():  # the host colours its own lines
        return _run(given)


def _run(given: Sequence[str]) -> int:
    command, options = parse(*parsers(), given)
    quick_imports.in_own_process = command not in ("host", "train")  # which run other programs' code here
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("gptq_webui").setLevel(logging.INFO)
    if command in _QUIET and not options.verbose:
        logging.getLogger(_QUIET[command]).setLevel(logging.WARNING)
    try:
        return int(options.run(options))
    except GptqWebuiError as error:
        return exit_codes.report(error, options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: `| head`
        return exit_codes.OTHER
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:
        if not (said := of_the_disk(error)):
            raise
        return exit_codes.report(DiskFull(said) if "disk is full" in said else GptqWebuiError(said), options)


def parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The parser, and that of each command."""
    parser = CommandParser(
        prog="gptq-webui",
        description="Downloads GPTQ models, loads them and chats. Without a command it opens the web page.",
        epilog="`gptq-webui COMMAND --help` lists its options. `gptq-webui --demo` tries everything with a small model. "
        + exit_codes.HELP,
    )
    parser.add_argument("--version", action="version", version=f"gptq-webui {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="open the web page (the default)")
    add_models(serve, several=True)
    serve.add_argument("--model", metavar="NAME", help="load this model at the start")
    serve.add_argument("--demo", action="store_true", help="make a small GPTQ model on this machine (once) and load it")
    serve.add_argument("--port", type=int, help="port of the page and the API (default: 7860, or the next free one)")
    serve.add_argument(
        "--api-port", type=int, metavar="PORT", help="the API alone on one more port; text-generation-webui uses 5000"
    )
    serve.add_argument("--queue", type=int, metavar="N", help="API requests that run or wait, at most (default: 512)")
    serve.add_argument(
        "--parallel", type=int, metavar="N", help="answers at the same time, if the loaded model can (default: what it can)"
    )
    serve.add_argument(
        "--load-on-request",
        action="store_true",
        help="load the local model that an API request names (keys need --admin)",
    )
    serve.add_argument("--no-browser", action="store_true", help="do not open a browser")
    add_loading(serve)
    access_flags.add(serve)
    tgi_flags.add(serve)
    serve.set_defaults(run=_serve)

    branches = commands.add_parser("branches", help="compare the branches of a model, and show which one fits this machine")
    branches.add_argument("ref", metavar="REF", help="owner/name, for example TheBloke/Mistral-7B-Instruct-v0.2-GPTQ")
    branches.add_argument("--context", type=int, metavar="TOKENS", help="context length for the comparison (default: 4096)")
    branches.add_argument("--memory", type=float, metavar="GB", help="free memory of another GPU, to compare for that one")
    branches.add_argument("--more", action="store_true", help="show the damping and the calibration data too")
    add_json(branches)
    add_models(branches)
    branches.set_defaults(run=_branches)

    download = commands.add_parser("download", help="download a model: owner/name or owner/name:branch")
    add_download(download)
    add_models(download)
    download.set_defaults(run=_download)

    models = commands.add_parser("models", help="list the models on this machine")
    add_json(models)
    add_models(models, several=True)
    add_remote(models)
    models.set_defaults(run=_library("models"), model=None)

    for name, run, summary in (
        ("verify", "verify", "hash every file of a model again"),
        ("repair", "repair", "verify, and fetch only what is wrong or missing"),
        ("update", "update", "check whether the branch has moved"),
        ("remove", "remove", "delete a model, and show how much space that frees"),
        ("rescue", "rescue_settings", "write a missing or wrong quantize_config.json from the tensors"),
        ("convert", "convert", "make safetensors of .bin or .pt weights, without running what is in them"),
    ):
        keeping = commands.add_parser(name, help=summary)
        keeping.add_argument("name", metavar="NAME", help="as `gptq-webui models` lists it")
        if name in ("verify", "update"):
            add_json(keeping)
        if name == "update":
            keeping.add_argument("--download", action="store_true", help="download what has changed")
        if name == "remove":
            keeping.add_argument("--yes", action="store_true", help="do not ask")
        if name == "convert":
            keeping.add_argument("--delete-original", action="store_true", help="delete the old files afterwards")
        add_models(keeping)
        keeping.set_defaults(run=_library(run))

    chat = commands.add_parser("chat", help="chat in the terminal, or answer each line of a pipe")
    add_chat(chat)
    add_models(chat)
    add_loading(chat)
    chat.set_defaults(run=_chat)

    ask = commands.add_parser("ask", help="ask one question and print the answer")
    ask.add_argument("question", metavar="QUESTION")
    add_models(ask)
    ask.add_argument("--model", metavar="NAME", help="the model to ask (default: the last one used)")
    ask.add_argument("--demo", action="store_true", help="ask the demo model")
    ask.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    ask.add_argument("--max-new-tokens", type=int, metavar="N", help="cut the answer after N tokens")
    ask.add_argument("--seed", type=int, help="the same seed gives the same answer")
    ask.add_argument("--raw", action="store_true", help="send the text unchanged, without the chat template")
    add_json(ask)
    add_loading(ask)
    ask.set_defaults(run=_ask)

    benchmark = commands.add_parser("benchmark", help="measure a model for a few seconds, and print one line to paste")
    benchmark.add_argument("model", nargs="?", metavar="MODEL", help="its name (default: the last one used)")
    add_models(benchmark)
    benchmark.add_argument("--demo", action="store_true", help="measure the demo model")
    add_json(benchmark)
    add_loading(benchmark)
    benchmark.set_defaults(run=_benchmark)

    quantize = commands.add_parser("quantize", help="make GPTQ folders of a 16-bit model")
    add_quantize(quantize)
    add_models(quantize)
    quantize.set_defaults(run=_later("quantize_command", "quantize"))

    train = commands.add_parser("train", help="train a LoRA adapter on a GPTQ model with your conversations")
    add_train(train)
    add_models(train)
    train.set_defaults(run=_later("train_command", "train"))

    evaluate = commands.add_parser("evaluate", help="perplexity of a model, and how near it is to another")
    evaluate.add_argument("model", metavar="MODEL", help="its name or folder")
    evaluate.add_argument("--against", metavar="OTHER", help="the model to compare with, or a folder of --keep")
    evaluate.add_argument("--keep", type=Path, metavar="DIR", help="write the model's logits there, for --against of others")
    evaluate.add_argument("--text", type=Path, metavar="FILE", help="text in UTF-8 (default: Python's manual)")
    evaluate.add_argument("--window", type=int, default=512, metavar="TOKENS", help="tokens read at once (default: 512)")
    evaluate.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of text, at most (default: 4096)")
    add_json(evaluate)
    add_models(evaluate)
    evaluate.set_defaults(run=_later("evaluate_command", "evaluate"))

    export = commands.add_parser("export", help="write a model anew: in 16 bits, with an adapter merged, or as plain GPTQ")
    add_export(export)
    add_models(export)
    export.set_defaults(run=_later("export_command", "write"))

    upload = commands.add_parser("upload", help="send GPTQ folders to the branches of a repository on the Hub")
    add_upload(upload)
    add_json(upload)
    add_models(upload)
    upload.set_defaults(run=_later("upload_command", "send"))

    perplexity = commands.add_parser("perplexity", help="how well a model predicts texts, as it answers on this machine")
    add_perplexity(perplexity)
    add_models(perplexity)
    add_loading(perplexity)
    perplexity.set_defaults(run=_perplexity)

    keys = commands.add_parser("keys", help="API keys: list them, make or remove one")
    keys.add_argument("action", nargs="?", choices=("list", "new", "remove"), default="list")
    keys.add_argument("name", nargs="?", metavar="NAME")
    add_json(keys)
    keys.add_argument("--admin", action="store_true", help="a key that may also load and download")
    keys.set_defaults(run=_keys, verbose=False)

    doctor = commands.add_parser("doctor", help="show what this machine has and which loaders can work on it")
    add_models(doctor, several=True)
    add_remote(doctor)
    doctor.add_argument("--model", metavar="NAME", help="show it for this model")
    add_json(doctor)
    doctor.set_defaults(run=_doctor)

    host = commands.add_parser("host", help="start text-generation-webui so that its --model can be a GPTQ folder")
    host.add_argument("--folder", type=Path, help="where text-generation-webui is (default: this folder)")
    host.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="the arguments of its server.py")
    host.set_defaults(run=_host, verbose=False)
    return parser, dict(commands.choices)


def _serve(options: argparse.Namespace) -> int:
    from .server_process import serve

    return serve(options)


def _branches(options: argparse.Namespace) -> int:
    from .branches_command import branches

    return branches(options)


def _download(options: argparse.Namespace) -> int:
    from .download_command import download

    return download(options)


def _library(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from . import library_commands

        return int(getattr(library_commands, name)(options))

    return run


def _keys(options: argparse.Namespace) -> int:
    return access_flags.run_keys(options)


def _host(options: argparse.Namespace) -> int:
    from .host_launcher import run_host

    return run_host(options.arguments, options.folder)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(options)


def _later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """A command's function, imported when it is called."""
    return lambda options: int(getattr(import_module(f"{__package__}.{module}"), name)(options))


def _perplexity(options: argparse.Namespace) -> int:
    from .perplexity_command import perplexity

    return perplexity(options)


def _benchmark(options: argparse.Namespace) -> int:
    from .engine_commands import benchmark

    return benchmark(options)


def _chat(options: argparse.Namespace) -> int:
    from .chat_command import chat

    return chat(options)


def _ask(options: argparse.Namespace) -> int:
    from .engine_commands import ask

    return ask(options)
