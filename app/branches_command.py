"""`gptq-webui branches owner/name`: the model card's table, and how each branch fits this machine."""

import argparse
import json
import shutil
import sys
from typing import Any

from ..core.model_ref import ModelRef
from ..core.units import format_bytes
from ..engine.advice import DEFAULT_CONTEXT_TOKENS, Advice, Offer, advise, gigabytes
from ..engine.available_memory import available_memory
from ..hub.branches import read_branches
from ..loaders.machine.memory_fit import Memory
from .engine_commands import make_engine

_SHORT = ("Branch", "Bits", "GS", "Act Order", "Seq Len", "Size", "ExLlama", "Memory", "Fits", "Loader")
_MORE = ("Damp %", "GPTQ dataset", "Description")
_FITS = {"fits": "yes", "partly": "partly on the CPU", "tight": "tight", "not": "no", "no loader": "no loader"}


def branches(options: argparse.Namespace) -> int:
    """The table on stdout, the advice on stderr; with --json everything on stdout."""
    ref = ModelRef.parse(options.ref)
    engine = make_engine(options)
    memory = Memory(int(options.memory * 1e9), int(options.memory * 1e9)) if options.memory else available_memory()
    context = options.context or DEFAULT_CONTEXT_TOKENS
    found = read_branches(engine.library.hub, ref.repo)
    advice = advise(found, engine.loaders, context, memory)
    if options.json:
        print(json.dumps(as_json(advice), indent=1))
        return 0
    names = (*_SHORT, *_MORE) if options.more else (*_SHORT, _MORE[-1])
    rows = [[cells(offer, context)[name] for name in names] for offer in advice.offers]
    best = [offer is advice.best for offer in advice.offers]
    print(table(names, rows, best, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for line in (*found.notes, *(note for offer in advice.offers for note in notes(offer)), advice.reason):
        print(line, file=sys.stderr)
    if advice.best is not None:
        print(f"To download it: gptq-webui download {advice.best.branch.ref}", file=sys.stderr)
    return 0


def cells(offer: Offer, context_tokens: int) -> dict[str, str]:
    """One row of the table, by column; "" for what is unknown."""
    branch, quantize = offer.branch, offer.branch.quantize
    model_card = branch.model_card
    group = model_card.group_size if quantize is None else "None" if quantize.group_size == -1 else str(quantize.group_size)
    return {
        "Branch": branch.name,
        "Bits": model_card.bits if quantize is None else str(quantize.bits),
        "GS": group,
        "Act Order": model_card.act_order if quantize is None else "Yes" if quantize.desc_act else "No",
        "Seq Len": model_card.seq_len,
        "Size": format_bytes(branch.size_bytes) if branch.selection else model_card.size,
        "ExLlama": branch.exllama,
        "Memory": gigabytes(offer.fit.needs_bytes) if offer.fit.needs_bytes else "",
        "Fits": _FITS[offer.fit.state] if branch.selection else "",
        "Loader": offer.fit.loader,
        "Damp %": branch.damp_percent,
        "GPTQ dataset": branch.dataset,
        "Description": model_card.description if branch.selection else str(branch.error or ""),
    }


def notes(offer: Offer) -> tuple[str, ...]:
    """What the user should know about a branch, in addition to its row."""
    return offer.branch.notes + ((f"{offer.branch.name}: {offer.fit.text}",) if offer.fit.state == "no loader" else ())


def as_json(advice: Advice) -> dict[str, Any]:
    """Everything, for scripts. Sizes are bytes."""
    listed = []
    for offer in advice.offers:
        branch, quantize = offer.branch, offer.branch.quantize
        listed.append(
            {
                "branch": branch.name,
                "ref": str(branch.ref),
                "commit": branch.commit,
                "bits": quantize.bits if quantize else None,
                "group_size": quantize.group_size if quantize else None,
                "act_order": quantize.desc_act if quantize else None,
                "damp_percent": branch.damp_percent or None,
                "dataset": branch.dataset or None,
                "seq_len": branch.model_card.seq_len or None,
                "size_bytes": branch.size_bytes,
                "download_bytes": branch.selection.total_bytes if branch.selection else None,
                "exllama": branch.exllama or None,
                "description": branch.model_card.description or None,
                "memory_bytes": offer.fit.needs_bytes or None,
                "fit": offer.fit.state if branch.selection else None,
                "tokens_per_s": offer.fit.tokens_per_s,
                "loader": offer.fit.loader or None,
                "text": offer.fit.text,
                "error": str(branch.error) if branch.error else None,
            }
        )
    return {
        "repo": advice.found.repo,
        "context_tokens": advice.context_tokens,
        "free_bytes": advice.memory.ram if advice.memory.gpu is None else advice.memory.gpu,
        "recommended": advice.best.branch.name if advice.best else None,
        "reason": advice.reason,
        "branches": listed,
    }


def table(names: tuple[str, ...], rows: list[list[str]], best: list[bool], width: int | None) -> str:
    """Aligned columns, "*" before the recommended row. A row that is longer than `width` is cut at its end."""
    widths = [max(len(each) for each in column) for column in zip(names, *rows, strict=True)]
    lines = []
    for mark, row in zip((" ", *("*" if each else " " for each in best)), (list(names), *rows), strict=True):
        line = f"{mark} " + "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
        lines.append(line if width is None or len(line) <= width else line[: width - 1] + "…")
    return "\n".join(lines)
