"""The engine of this process, `ask` and `benchmark`. The answer goes to stdout, everything else to stderr."""

import argparse
import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

from ..core.chat import Finish, Message
from ..core.errors import NoSuchModel
from ..core.folder_files import printable
from ..core.params import GenerationParams
from ..core.units import plural
from ..core.user_folders import is_system_folder
from ..engine.engine import Engine, Status
from ..engine.hub_settings import HubSettings
from ..engine.settings import Settings, hosts_models_folders
from ..hub.library import Library
from ..loaders.contract.base import LoadedModel
from ..loaders.transformers.transformers_options import MOST_PARALLEL
from .safe_terminal import raw


def make_engine(options: argparse.Namespace) -> Engine:
    """The engine of this process, over the folders of --models-dir or those of the settings."""
    settings = Settings()
    folders = [Path(each).expanduser().resolve() for each in options.models_dir or ()]
    for folder in folders:
        if not folder.is_dir():
            raise NoSuchModel(f"There is no folder {folder}. Make it, or name another one with --models-dir.")
        if is_system_folder(folder):
            raise NoSuchModel(f"{folder} belongs to the operating system. Name a folder with models with --models-dir.")
    library = Library(folders or [*settings.models_folders, *hosts_models_folders()])
    HubSettings(library.hub, settings)
    return Engine(library, settings)


def find_elsewhere(engine: Engine, options: argparse.Namespace) -> list[str]:
    """Add the models that the engines of --remote serve to the library. Returns their names. Raises LoadFailed."""
    if not options.remote:
        return []
    from ..core.models import remote_model
    from ..loaders.remote.remote_loader import RemoteLoader, RemoteOptions

    asked = RemoteOptions(base_url=", ".join(options.remote))
    found = {model.name: model for model in RemoteLoader().models(asked)}
    unlisted = remote_model(options.model or "", served_by=asked.base_url)  # some engines do not list what they can load
    if options.model and unlisted.name not in found and unlisted.name not in [each.name for each in engine.library.models()]:
        found[unlisted.name] = unlisted
    engine.library.elsewhere = tuple(found.values())
    return list(found)


def requested_model(engine: Engine, options: argparse.Namespace) -> str | None:
    """The library's name for --model, or for the only model of --remote; None if neither names one."""
    elsewhere = find_elsewhere(engine, options)
    if not options.model:
        return elsewhere[0] if len(elsewhere) == 1 else None
    name = options.model.replace("/", "_")
    return name if name in elsewhere else options.model


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """--dtype, --context and --parallel under the names that the loaders use."""
    parallel = getattr(options, "parallel", None)
    given = {"dtype": options.dtype, "context_tokens": options.context, "max_batch_size": parallel}
    given["parallel"] = None if parallel is None else min(parallel, MOST_PARALLEL)
    return {name: value for name, value in given.items() if value is not None}


def params_of(options: argparse.Namespace) -> dict[str, Any]:
    """--temperature, --max-new-tokens and --seed, where they are given. Raises BadParameter."""
    given = {"temperature": options.temperature, "max_new_tokens": options.max_new_tokens, "seed": options.seed}
    found = {name: value for name, value in given.items() if value is not None}
    GenerationParams(**found)
    return found


def ask(options: argparse.Namespace) -> int:
    params = GenerationParams(**params_of(options))  # before the load: a mistake must not cost a minute
    engine = make_engine(options)
    line = StatusLine()
    engine.slot.watchers.append(lambda status: line.show(loading_line(status)))
    try:
        loaded = load_model(engine, options)
        line.end()
        cancel = threading.Event()
        if options.raw:
            answer = engine.complete(options.question, params, cancel)
        else:
            if warning := loaded.template.warning:
                print(f"{loaded.model.name}: {warning}", file=sys.stderr)
            answer = engine.chat([Message("user", options.question)], params, cancel)
        try:
            text, finish = answer.text() if options.json else ("", _print(answer))
        except KeyboardInterrupt:
            cancel.set()
            raise
        if options.json:
            print(json.dumps({"model": loaded.model.name, "answer": text, **finish_as_json(finish)}))
        print(summary(finish), file=sys.stderr)
        return 0
    finally:
        line.end()
        engine.unload()


def benchmark(options: argparse.Namespace) -> int:
    engine = make_engine(options)
    line, cancel = StatusLine(), threading.Event()
    engine.slot.watchers.append(lambda status: line.show(loading_line(status)))
    try:
        load_model(engine, options)
        from ..engine.benchmark import measure

        measured = measure(engine, cancel, line.show)
        line.end()
        if options.json:
            print(json.dumps(dataclasses.asdict(measured) if measured is not None else None))
        else:
            print(measured)
        return 0
    finally:
        cancel.set()
        line.end()
        engine.unload()


def load_model(engine: Engine, options: argparse.Namespace) -> LoadedModel:
    """Load --demo, --model, or the only model there is."""
    if options.demo:
        return engine.load_demo(options.loader, load_options(options))
    return engine.load(name_of(engine, requested_model(engine, options)), options.loader, load_options(options))


def _print(answer: Any) -> Finish:
    finish = Finish("cancelled")
    for event in answer:
        if isinstance(event, Finish):
            finish = event
        else:
            print(event.text, end="", flush=True)
    print(flush=True)
    return finish


def finish_as_json(finish: Finish) -> dict[str, Any]:
    """Why an answer ended and what it cost, for scripts."""
    counts = {"prompt_tokens": finish.prompt_tokens, "cached_tokens": finish.cached_tokens, "new_tokens": finish.new_tokens}
    return {
        "reason": finish.reason, **counts, "tokens_per_s": round(finish.tokens_per_s, 2),
        "first_token_s": round(finish.first_token_s, 4),
    }  # fmt: skip


def summary(finish: Finish) -> str:
    cut = "; stopped at the limit" if finish.reason == "length" else ""
    count = plural(finish.new_tokens, "new token")
    return f"{count}, {finish.tokens_per_s:.1f} tokens/s, first token after {finish.first_token_s:.2f} s{cut}"


def name_of(engine: Engine, given: str | None) -> str:
    """--model, else the last one used, else the only one. Raises NoSuchModel, which lists the names."""
    if given:
        return given
    names = [model.name for model in engine.library.models() if model.is_packed or model.kind in ("plain", "remote")]
    if engine.settings.last_model in names:
        return engine.settings.last_model
    if len(names) == 1:
        return names[0]
    listed = f"There are: {', '.join(names)}." if names else "There is none yet: try --demo, or gptq-webui download REF."
    raise NoSuchModel(f"Name a model with --model NAME. {listed}")


def loading_line(status: Status) -> str:
    return f"{status.name}: {status.text} ({status.share:.0%})" if status.phase == "loading" else ""


class StatusLine:
    """One line on stderr that is overwritten while it changes; plain lines if stderr is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = ""

    def show(self, text: str) -> None:
        if not text or text == self._shown:
            return
        if self._terminal:
            print(f"\r\x1b[K{printable(text)}", end="", file=raw(sys.stderr), flush=True)
        elif text.split("(")[0] != self._shown.split("(")[0] or not self._shown:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def end(self) -> None:
        if self._terminal and self._shown:
            print("\r\x1b[K", end="", file=raw(sys.stderr), flush=True)
        self._shown = ""
