"""`gptq-webui download`, with every flag that model cards of 2023 use.

Their `huggingface-cli download …` works with the name exchanged. Flags without a meaning are named in one line each.
"""

import argparse
import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path

from ..core.errors import BadParameter
from ..core.model_ref import ModelRef
from ..engine.advice import fit_of_plan
from ..engine.available_memory import available_memory
from ..hub import file_selection
from ..hub.library import Library, Plan
from ..hub.origins import cache_folder
from .engine_commands import make_engine
from .exit_codes import INTERRUPTED
from .progress_bars import Bars

_COMMIT = re.compile(r"[0-9a-f]{40}")


def download(options: argparse.Namespace) -> int:
    ref = _ref(options)
    for line in _without_meaning(options):
        _say(options, line)
    engine = make_engine(options)
    library = engine.library
    if options.token:
        library.hub.use_token(options.token)
    _say(options, f"Asking the Hub about {ref} …")
    plan = _plan(options, library, ref)
    for note in (plan.summary, *plan.notes):
        _say(options, note)
    if plan.selection.weights:
        _say(options, fit_of_plan(plan, engine.loaders, available_memory()).text)
    bars, cancel, received = Bars(options.quiet), threading.Event(), 0
    try:
        for progress in library.fetch(plan, cancel, **({"at_once": options.max_workers} if options.max_workers else {})):
            received = progress.received_bytes
            bars.show(progress)
    except KeyboardInterrupt:
        cancel.set()
        bars.end()
        _say(options, "Stopped. What arrived is kept; the same command continues from there.")
        return INTERRUPTED
    finally:
        bars.end()
    if options.cache_dir and not options.local_dir:
        _point_to(plan)
    _say(options, f"Done: {plan.folder}")
    if options.json:
        outcome = {"ref": str(ref), "commit": plan.listing.commit, "folder": str(plan.folder)}
        sizes = {"total_bytes": plan.selection.total_bytes, "received_bytes": received}
        files = {file.path: {"size_bytes": file.size_bytes, "hash": file.fingerprint} for file in plan.selection.files}
        print(json.dumps({**outcome, **sizes, "files": files}, indent=1))
    elif options.local_dir or options.cache_dir:
        print(plan.folder)  # as huggingface-cli does, for scripts
    return 0


def _ref(options: argparse.Namespace) -> ModelRef:
    ref = ModelRef.parse(options.ref)
    if options.repo_type not in (None, "model"):
        raise BadParameter(f"--repo-type {options.repo_type}: gptq-webui downloads models only.")
    if not options.revision:
        return ref
    named = ModelRef.parse(f"{ref.repo}:{options.revision}")
    if ref.branch not in ("main", named.branch):
        raise BadParameter(f"REF says branch {ref.branch!r} and --revision {named.branch!r}. Give one of them.")
    return named


def _plan(options: argparse.Namespace, library: Library, ref: ModelRef) -> Plan:
    commit = ref.branch if _COMMIT.fullmatch(ref.branch) else ""
    folder = options.local_dir.expanduser().absolute() if options.local_dir else None
    if options.files or options.include:
        listing = library.hub.listing(ref, commit)
        plan = Plan(
            listing, file_selection.select_by_name(listing, options.files, options.include, options.exclude, None), Path(), 0
        )
    else:
        plan = library.plan(ref, options.any_kind, allow_pickle=options.allow_pickle, commit=commit)
        if options.exclude:
            plan = replace(plan, selection=file_selection.select_by_name(plan.listing, (), (), options.exclude, plan.selection))
    if folder is None and options.cache_dir:
        folder = _snapshot(options.cache_dir.expanduser().absolute(), ref, plan.listing.commit)
    return library.with_folder(plan, folder)


def _snapshot(cache: Path, ref: ModelRef, commit: str) -> Path:
    """Where huggingface-hub looks for it: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    return cache / f"models--{ref.repo.replace('/', '--')}" / "snapshots" / commit


def _point_to(plan: Plan) -> None:
    """Name the snapshot, so that `from_pretrained(…, revision=branch)` finds it without a network."""
    path = plan.folder.parents[1] / "refs" / plan.ref.branch
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan.listing.commit, encoding="utf-8")


def _without_meaning(options: argparse.Namespace) -> list[str]:
    """One line for each given flag or variable that no longer has a meaning."""
    lines = []
    if options.local_dir_use_symlinks is not None:
        lines.append("--local-dir-use-symlinks is ignored: files are always in their folder, never links.")
    if options.resume_download:
        lines.append("--resume-download is ignored: a download always continues where it stopped.")
    if options.force_download:
        lines.append("--force-download is ignored: `gptq-webui repair NAME` checks every byte and fetches what is wrong.")
    if os.environ.get("HF_HUB_ENABLE_HF_TRANSFER"):
        lines.append("HF_HUB_ENABLE_HF_TRANSFER is ignored: a download here is fast and resumes without it.")
    if os.environ.get("HF_HOME") and not (options.cache_dir or options.local_dir):
        lines.append(f"HF_HOME is where tokens and the cache are; to download into it, add --cache-dir {cache_folder()}")
    return lines


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)
