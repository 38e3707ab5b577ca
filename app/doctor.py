"""`gptq-webui doctor`: what this machine has, which loaders can work on it, why the others cannot, and what would change that."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..core.models import LocalModel
from ..core.quantize_config import QuantizeConfig
from ..engine import support_report
from ..engine.advice import torch_banner
from ..loaders.choose import Row, plugin_problems, survey
from .engine_commands import find_elsewhere, make_engine

_WIDTH = 110


def doctor(options: argparse.Namespace) -> int:
    """Print it. With --model, the loaders judge that model; without, a usual GPTQ model."""
    engine = make_engine(options)
    find_elsewhere(engine, options)
    if options.json:
        judged = [engine.library.get(options.model)] if options.model else [usual_model(bits) for bits in (4, 8)]
        models = [{"model": each.name, "badge": each.badge, "loaders": as_json(engine.planner.survey(each))} for each in judged]
        notes = [each for each in (torch_banner(), *plugin_problems()) if each]
        print(json.dumps({"machine": support_report.machine().splitlines(), "notes": notes, "models": models}, indent=1))
        return 0
    print(support_report.machine())
    if banner := torch_banner():
        print("\n" + banner)
    for problem in plugin_problems():
        print("\n" + textwrap.fill(problem, _WIDTH, break_on_hyphens=False))
    if options.model:
        model = engine.library.get(options.model)
        print(f"\nLoaders, for {model.name} ({model.badge}):")
        print("\n".join(lines(engine.planner.survey(model))))
        return 0
    for bits in (4, 8):
        model = usual_model(bits)
        print(f"\nLoaders, for a usual {bits}-bit model ({model.badge}, Llama):")
        print("\n".join(lines(survey(model, engine.loaders))))
    print("\nFor one of your models: gptq-webui doctor --model NAME")
    return 0


def usual_model(bits: int) -> LocalModel:
    """A model like thousands of TheBloke's; it does not exist on disk."""
    folder = Path("usual")
    quantize = QuantizeConfig(bits, 128, desc_act=True)
    return LocalModel(folder, "gptq", quantize, 0, 4096, "LlamaForCausalLM", (folder / "model.safetensors",))


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each loader, whether it can, why not, and what would change that."""
    return [
        {
            "loader": row.loader, "can": row.refusal is None, "chosen": row.chosen, "reason": row.reason or None,
            "note": row.note or None, "why_not": row.refusal.reason if row.refusal else None,
            "cure": row.refusal.cure or None if row.refusal else None,
        }
        for row in rows
    ]  # fmt: skip


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """One paragraph for each loader: can or cannot, why, and what would change it."""
    widest = max(len(row.loader) for row in rows)
    for row in rows:
        if row.refusal is not None:
            state = f"cannot  {row.refusal.reason}." + (f" Cure: {row.refusal.cure}" if row.refusal.cure else "")
        else:
            state = "; ".join(each for each in ("taken   " + row.reason if row.chosen else "can     ", row.note) if each)
            state = state.replace("can     ; ", "can     ")
        first, *more = textwrap.wrap(state, _WIDTH - widest - 4, subsequent_indent=" " * 8, break_on_hyphens=False) or [""]
        yield f"  {row.loader:<{widest}}  {first}"
        yield from (f"  {'':<{widest}}  {line}" for line in more)
