"""The command line: `gptq-webui [serve|branches|download|models|…]`. Answers --help without a heavy import."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import GptqWebuiError
from . import access_flags, exit_codes, tgi_flags
from .download_arguments import add_to as add_download
from .perplexity_arguments import add_to as add_perplexity
from .quantize_arguments import add_to as add_quantize

COMMANDS = (
    "serve", "branches", "download", "models", "verify", "repair", "update", "remove", "rescue", "convert", "ask", "benchmark",
    "quantize", "evaluate", "perplexity", "doctor", "keys", "host",
)  # fmt: skip

_WITH_BARS = ("download", "verify", "repair", "update")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, as exit_codes.py lists them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in (*COMMANDS, "-h", "--help", "--version"):
        given.insert(0, "serve")
    options = _parser().parse_args(given)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("gptq_webui").setLevel(logging.INFO)
    if given[0] in _WITH_BARS and not options.verbose:
        logging.getLogger("gptq_webui.hub").setLevel(logging.WARNING)  # a line of the log would break the bars
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a pipe on Windows has no encoding for an emoji
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return int(options.run(options))
    except GptqWebuiError as error:
        print(f"gptq-webui: {error}", file=sys.stderr)
        code = exit_codes.of(error)
        if getattr(options, "json", False):
            print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": code}))
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: `| head`
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptq-webui",
        description="Downloads GPTQ models, loads them and chats. Without a command it opens the web page.",
        epilog="`gptq-webui COMMAND --help` lists its options. `gptq-webui --demo` tries everything with a small model.",
    )
    parser.add_argument("--version", action="version", version=f"gptq-webui {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="open the web page (the default)")
    _add_models(serve, several=True)
    serve.add_argument("--model", metavar="NAME", help="load this model at the start")
    serve.add_argument("--demo", action="store_true", help="make a small GPTQ model on this machine (once) and load it")
    serve.add_argument("--port", type=int, help="port of the page and the API (default: 7860, or the next free one)")
    serve.add_argument(
        "--api-port", type=int, metavar="PORT", help="the API alone on one more port; text-generation-webui uses 5000"
    )
    serve.add_argument("--queue", type=int, metavar="N", help="API requests that run or wait, at most (default: 128)")
    serve.add_argument(
        "--parallel", type=int, metavar="N", help="answers at the same time, if the loaded model can (default: what it can)"
    )
    serve.add_argument("--no-browser", action="store_true", help="do not open a browser")
    _add_loading(serve)
    access_flags.add(serve)
    tgi_flags.add(serve)
    serve.set_defaults(run=_serve)

    branches = commands.add_parser("branches", help="compare the branches of a model, and show which one fits this machine")
    branches.add_argument("ref", metavar="REF", help="owner/name, for example TheBloke/Mistral-7B-Instruct-v0.2-GPTQ")
    branches.add_argument("--context", type=int, metavar="TOKENS", help="context length for the comparison (default: 4096)")
    branches.add_argument("--memory", type=float, metavar="GB", help="free memory of another GPU, to compare for that one")
    branches.add_argument("--more", action="store_true", help="show the damping and the calibration data too")
    branches.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    _add_models(branches)
    branches.set_defaults(run=_branches)

    download = commands.add_parser("download", help="download a model: owner/name or owner/name:branch", epilog=exit_codes.HELP)
    add_download(download)
    _add_models(download)
    download.set_defaults(run=_download)

    models = commands.add_parser("models", help="list the models on this machine")
    models.add_argument("--json", action="store_true", help="everything as JSON on stdout")
    _add_models(models, several=True)
    _add_remote(models)
    models.set_defaults(run=_library("models"), model=None)

    for name, run, summary in (
        ("verify", "verify", "hash every file of a model again"),
        ("repair", "repair", "verify, and fetch only what is wrong or missing"),
        ("update", "update", "check whether the branch has moved"),
        ("remove", "remove", "delete a model, and show how much space that frees"),
        ("rescue", "rescue_settings", "write a missing or wrong quantize_config.json from the tensors"),
        ("convert", "convert", "make safetensors of .bin or .pt weights, without running what is in them"),
    ):
        keeping = commands.add_parser(name, help=summary, epilog=exit_codes.HELP)
        keeping.add_argument("name", metavar="NAME", help="as `gptq-webui models` lists it")
        if name in ("verify", "update"):
            keeping.add_argument("--json", action="store_true", help="write the result as JSON on stdout")
        if name == "update":
            keeping.add_argument("--download", action="store_true", help="download what has changed")
        if name == "remove":
            keeping.add_argument("--yes", action="store_true", help="do not ask")
        if name == "convert":
            keeping.add_argument("--delete-original", action="store_true", help="delete the old files afterwards")
        _add_models(keeping)
        keeping.set_defaults(run=_library(run))

    ask = commands.add_parser("ask", help="ask one question and print the answer")
    ask.add_argument("question", metavar="QUESTION")
    _add_models(ask)
    ask.add_argument("--model", metavar="NAME", help="the model to ask (default: the last one used)")
    ask.add_argument("--demo", action="store_true", help="ask the demo model")
    ask.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    ask.add_argument("--max-new-tokens", type=int, metavar="N", help="cut the answer after N tokens")
    ask.add_argument("--seed", type=int, help="the same seed gives the same answer")
    ask.add_argument("--raw", action="store_true", help="send the text unchanged, without the chat template")
    _add_loading(ask)
    ask.set_defaults(run=_ask)

    benchmark = commands.add_parser("benchmark", help="measure a model for a few seconds, and print one line to paste")
    benchmark.add_argument("model", nargs="?", metavar="MODEL", help="its name (default: the last one used)")
    _add_models(benchmark)
    benchmark.add_argument("--demo", action="store_true", help="measure the demo model")
    _add_loading(benchmark)
    benchmark.set_defaults(run=_benchmark)

    quantize = commands.add_parser("quantize", help="make GPTQ folders of a 16-bit model", epilog=exit_codes.HELP)
    add_quantize(quantize)
    _add_models(quantize)
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser("evaluate", help="perplexity of a model, and how near it is to another")
    evaluate.add_argument("model", metavar="MODEL", help="its name or folder")
    evaluate.add_argument("--against", metavar="OTHER", help="the model to compare with, for example the 16-bit original")
    evaluate.add_argument("--text", type=Path, metavar="FILE", help="text in UTF-8 (default: Python's manual)")
    evaluate.add_argument("--window", type=int, default=512, metavar="TOKENS", help="tokens read at once (default: 512)")
    evaluate.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of text, at most (default: 4096)")
    evaluate.add_argument("--json", action="store_true", help="write the result as JSON on stdout")
    _add_models(evaluate)
    evaluate.set_defaults(run=_evaluate)

    perplexity = commands.add_parser("perplexity", help="how well a model predicts texts, as it answers on this machine")
    add_perplexity(perplexity)
    _add_models(perplexity)
    _add_loading(perplexity)
    perplexity.set_defaults(run=_perplexity)

    keys = commands.add_parser("keys", help="API keys: list them, make or remove one")
    keys.add_argument("action", nargs="?", choices=("list", "new", "remove"), default="list")
    keys.add_argument("name", nargs="?", metavar="NAME")
    keys.add_argument("--admin", action="store_true", help="a key that may also load and download")
    keys.set_defaults(run=_keys, verbose=False)

    doctor = commands.add_parser("doctor", help="show what this machine has and which loaders can work on it")
    _add_models(doctor, several=True)
    _add_remote(doctor)
    doctor.add_argument("--model", metavar="NAME", help="show it for this model")
    doctor.set_defaults(run=_doctor)

    host = commands.add_parser("host", help="start text-generation-webui so that its --model can be a GPTQ folder")
    host.add_argument("--folder", type=Path, help="where text-generation-webui is (default: this folder)")
    host.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="the arguments of its server.py")
    host.set_defaults(run=_host, verbose=False)
    return parser


def _add_models(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """With `several`, more than one folder may follow one flag. Only for commands that have no other positional argument."""
    action: dict[str, Any] = {"action": "extend", "nargs": "+"} if several else {"action": "append"}
    parser.add_argument(
        "--models-dir", type=Path, metavar="DIR", help="folders with models; downloads go into the first", **action
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show more on the terminal")


def _add_remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remote",
        action="append",
        metavar="URL",
        help="also use the models of this engine on another machine (vLLM, TGI …); repeat it for engines that share the work",
    )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    _add_remote(parser)
    parser.add_argument("--dtype", type=_dtype, help="number format for computing: auto, fp16, bf16, fp32")
    parser.add_argument("--loader", metavar="NAME", help="open the model with this loader, for example transformers")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="context length (default: what fits, up to 8192)")


def _dtype(text: str) -> str:
    """TGI's float16 is our fp16."""
    name = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(text, text)
    if name not in ("auto", "fp16", "bf16", "fp32"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from auto, fp16, bf16, fp32")
    return name


def _serve(options: argparse.Namespace) -> int:
    from .serve import serve

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


def _quantize(options: argparse.Namespace) -> int:
    from .quantize_command import quantize

    return quantize(options)


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluate_command import evaluate

    return evaluate(options)


def _perplexity(options: argparse.Namespace) -> int:
    from .perplexity_command import perplexity

    return perplexity(options)


def _benchmark(options: argparse.Namespace) -> int:
    from .engine_commands import benchmark

    return benchmark(options)


def _ask(options: argparse.Namespace) -> int:
    from .engine_commands import ask

    return ask(options)
