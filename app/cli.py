"""The command line: `gptq-webui [serve|download|models|ask|doctor|host]`. Answers --help without a heavy import."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import GptqWebuiError
from . import doors, tgi_flags

COMMANDS = ("serve", "download", "models", "ask", "doctor", "keys", "host")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 an error that was said, 2 wrong usage, 130 Ctrl+C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help", "--version"):
        given.insert(0, "serve")
    options = _parser().parse_args(given)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("gptq_webui").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows has no encoding for an emoji
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return int(options.run(options))
    except GptqWebuiError as error:
        print(f"gptq-webui: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has gone: `| head`
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptq-webui",
        description="Downloads GPTQ models, loads them and chats. Without a command it opens the web page.",
        epilog="gptq-webui COMMAND --help tells more. `gptq-webui --demo` tries everything with a small model.",
    )
    parser.add_argument("--version", action="version", version=f"gptq-webui {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="open the web page (the default)")
    _add_models(serve, several=True)
    serve.add_argument("--model", metavar="NAME", help="load this model at the start")
    serve.add_argument("--demo", action="store_true", help="make a small GPTQ model on this machine, once, and load it")
    serve.add_argument("--port", type=int, help="port of the page and the API (default: 7860, or the next free one)")
    serve.add_argument(
        "--api-port", type=int, metavar="PORT", help="the API alone on another port, too; text-generation-webui's is 5000"
    )
    serve.add_argument("--queue", type=int, metavar="N", help="API requests that are answered or wait (default: 128)")
    serve.add_argument(
        "--parallel", type=int, metavar="N", help="answers at once, where the loaded model can (default: what it can)"
    )
    serve.add_argument("--no-browser", action="store_true", help="do not open a browser")
    _add_loading(serve)
    doors.add(serve)
    tgi_flags.add(serve)
    serve.set_defaults(run=_serve)

    download = commands.add_parser("download", help="download a model: owner/name or owner/name:branch")
    download.add_argument(
        "ref", metavar="REF", help="for example TheBloke/Mistral-7B-Instruct-v0.2-GPTQ:gptq-4bit-32g-actorder_True"
    )
    download.add_argument("--any-kind", action="store_true", help="also if it is no GPTQ model")
    _add_models(download)
    download.set_defaults(run=_download)

    models = commands.add_parser("models", help="list the models on this machine")
    _add_models(models, several=True)
    _add_remote(models)
    models.set_defaults(run=_models, model=None)

    ask = commands.add_parser("ask", help="ask one question and print the answer")
    ask.add_argument("question", metavar="QUESTION")
    _add_models(ask)
    ask.add_argument("--model", metavar="NAME", help="the model to ask (default: the last one used)")
    ask.add_argument("--demo", action="store_true", help="ask the demo model")
    ask.add_argument("--temperature", type=float, help="0 always takes the likeliest word")
    ask.add_argument("--max-new-tokens", type=int, metavar="N", help="cut the answer after N tokens")
    ask.add_argument("--seed", type=int, help="the same seed gives the same answer")
    ask.add_argument("--raw", action="store_true", help="give the text to the model as it is, without its chat template")
    _add_loading(ask)
    ask.set_defaults(run=_ask)

    keys = commands.add_parser("keys", help="API keys: list them, make or remove one")
    keys.add_argument("action", nargs="?", choices=("list", "new", "remove"), default="list")
    keys.add_argument("name", nargs="?", metavar="NAME")
    keys.add_argument("--admin", action="store_true", help="a key that may load and download, too")
    keys.set_defaults(run=_keys, verbose=False)

    doctor = commands.add_parser("doctor", help="tell what this machine has and which loader can work on it")
    _add_models(doctor, several=True)
    _add_remote(doctor)
    doctor.add_argument("--model", metavar="NAME", help="ask the loaders about this model")
    doctor.set_defaults(run=_doctor)

    host = commands.add_parser("host", help="start text-generation-webui so that its --model may be a GPTQ folder")
    host.add_argument("--folder", type=Path, help="where text-generation-webui is (default: this folder)")
    host.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="what its server.py is given")
    host.set_defaults(run=_host, verbose=False)
    return parser


def _add_models(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """`several` folders may follow one flag only where nothing else follows."""
    action: dict[str, Any] = {"action": "extend", "nargs": "+"} if several else {"action": "append"}
    parser.add_argument(
        "--models-dir", type=Path, metavar="DIR", help="folders with models; downloads go into the first", **action
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say more on the terminal")


def _add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remote",
        action="append",
        metavar="URL",
        help="also use the models of this engine elsewhere (vLLM, TGI …); again for several that share the work",
    )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    _add_remote(parser)
    parser.add_argument("--dtype", type=_dtype, help="number format of the computing: auto, fp16, bf16, fp32")
    parser.add_argument("--loader", metavar="NAME", help="open the model with this loader, for example transformers")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="context length (default: what fits, up to 8192)")


def _dtype(text: str) -> str:
    """TGI says float16 where we say fp16."""
    name = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(text, text)
    if name not in ("auto", "fp16", "bf16", "fp32"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from auto, fp16, bf16, fp32")
    return name


def _serve(options: argparse.Namespace) -> int:
    from .serve import serve

    return serve(options)


def _download(options: argparse.Namespace) -> int:
    from .commands import download

    return download(options)


def _models(options: argparse.Namespace) -> int:
    from .commands import models

    return models(options)


def _keys(options: argparse.Namespace) -> int:
    return doors.run_keys(options)


def _host(options: argparse.Namespace) -> int:
    from .host import run_host

    return run_host(options.arguments, options.folder)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor(options)


def _ask(options: argparse.Namespace) -> int:
    from .commands import ask

    return ask(options)
