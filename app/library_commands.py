"""The commands for models on disk: models, verify, repair, update, remove, rescue, convert."""

import argparse
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..core.errors import ModelError
from ..core.units import format_bytes, plural
from ..engine import disk_inventory, rescue
from ..hub import model_repair, verification
from ..hub.download_progress import Progress
from ..hub.verification import Verdict
from .engine_commands import find_elsewhere, make_engine
from .exit_codes import DAMAGED, INTERRUPTED
from .progress_bars import Bars


def models(options: argparse.Namespace) -> int:
    """One line each: name, kind, size, branch, commit, last used, perplexity, KL divergence, agreement; tabs between."""
    engine = make_engine(options)
    find_elsewhere(engine, options)
    found = disk_inventory.items(engine.library, engine.settings)
    if options.json:
        print(json.dumps([_as_json(each) for each in found], indent=1))
        return 0
    for each in found:
        used = each.used.strftime("%Y-%m-%d") if each.used else "-"
        size = format_bytes(each.size_bytes) if each.model.kind != "remote" else each.model.served_by
        facts = (each.model.name, each.model.badge, size, str(each.ref or "-"), each.commit[:8] or "-", used)
        print("\t".join((*facts, *each.figures.texts)))
    folders = ", ".join(str(root) for root in engine.library.roots)
    print(f"{plural(len(found), 'model')} in {folders}", file=sys.stderr)
    return 0


def verify(options: argparse.Namespace) -> int:
    """Hash every file again; exit code 8 if one is wrong or missing."""
    library = make_engine(options).library
    cancel = threading.Event()
    verdict = _watch(lambda: verification.verify(library.get(options.name).folder, cancel), cancel)
    if verdict is None:
        return INTERRUPTED
    if options.json:
        print(json.dumps(vars(verdict) | {"good": verdict.good}, indent=1))
    print(f"{options.name}: {verdict.text}", file=sys.stderr)
    return 0 if verdict.good else DAMAGED


def repair(options: argparse.Namespace) -> int:
    """Verify, fetch what is wrong."""
    library = make_engine(options).library
    cancel = threading.Event()
    verdict = _watch(lambda: model_repair.repair(library, options.name, cancel), cancel)
    if cancel.is_set():
        return INTERRUPTED
    if verdict is not None and verdict.good:
        print(f"{options.name}: {verdict.text}", file=sys.stderr)
    else:
        print(f"{options.name} is complete and right again.", file=sys.stderr)
    return 0


def update(options: argparse.Namespace) -> int:
    """Check whether the branch has moved; --download fetches the change."""
    library = make_engine(options).library
    found = model_repair.check_update(library, options.name)
    if options.json:
        commits = {"commit_here": found.commit_here, "commit_there": found.commit_there}
        changed = {"changed": found.changed, "bytes": found.changed_bytes}
        print(json.dumps({"ref": str(found.ref), "moved": found.moved, **commits, **changed}))
    print(found.text, file=sys.stderr)
    if options.download and found.moved:
        cancel = threading.Event()
        plan = library.with_folder(library.plan(found.ref, any_kind=True), library.get(options.name).folder)
        _watch(lambda: library.fetch(plan, cancel), cancel)
        if cancel.is_set():
            return INTERRUPTED
        print(f"{options.name} is up to date.", file=sys.stderr)
    return 0


def remove(options: argparse.Namespace) -> int:
    """Delete a model after a question, or without one with --yes."""
    library = make_engine(options).library
    model = library.get(options.name)
    freed = format_bytes(library.freed_bytes(options.name))
    if not options.yes:
        if not sys.stdin.isatty():
            raise ModelError(f"Removing {options.name} frees {freed}. Add --yes to delete it without a question.")
        print(f"Delete {model.folder}? It frees {freed}. [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was deleted.", file=sys.stderr)
            return 1
    library.remove(options.name)
    print(f"Removed {options.name}: {freed} are free.", file=sys.stderr)
    return 0


def rescue_settings(options: argparse.Namespace) -> int:
    """Write quantize_config.json from the tensors."""
    model = make_engine(options).library.get(options.name)
    wrong = rescue.settings_wrong(model)
    if not wrong:
        print(f"The settings of {options.name} agree with its tensors; nothing was written.", file=sys.stderr)
        return 0
    print(wrong, file=sys.stderr)
    print(f"Wrote {rescue.write_settings(model)}", file=sys.stderr)
    return 0


def convert(options: argparse.Namespace) -> int:
    """.bin and .pt to safetensors."""
    model = make_engine(options).library.get(options.name)
    cancel = threading.Event()
    written = rescue.convert(model, lambda _share, text: print(text, file=sys.stderr), cancel, options.delete_original)
    print(f"Wrote {', '.join(str(path) for path in written)}", file=sys.stderr)
    return 0


def _watch(job: Callable[[], Iterator[Progress | Verdict]], cancel: threading.Event) -> Verdict | None:
    """Show the job's progress; returns its verdict, if it has one. Ctrl+C sets `cancel`."""
    bars, verdict = Bars(), None
    try:
        for event in job():
            if isinstance(event, Verdict):
                verdict = event
            else:
                bars.show(event)
    except KeyboardInterrupt:
        cancel.set()
        print("Stopped.", file=sys.stderr)
    finally:
        bars.end()
    return verdict


def _as_json(item: disk_inventory.Item) -> dict[str, Any]:
    quantize = item.model.quantize
    return {
        "name": item.model.name,
        "folder": str(item.model.folder),
        "kind": item.model.kind,
        "bits": quantize.bits if quantize else None,
        "group_size": quantize.group_size if quantize else None,
        "act_order": quantize.desc_act if quantize else None,
        "ref": str(item.ref) if item.ref else None,
        "commit": item.commit or None,
        "size_bytes": item.size_bytes,
        "last_used": item.used.isoformat() if item.used else None,
        "problem": item.model.problem or item.rescue or None,
        "figures": dataclasses.asdict(item.figures),
    }
