"""The figures that measurements of a model's folder gave: perplexity, KL divergence, agreement, each with its text.

A small JSON file for each folder, in the user's data folder. Nothing is written into the model's folder. Figures belong to
one commit of the model: another download has none.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.models import LocalModel
from ..core.user_folders import data_folder
from .load_failures import commit_of

log = logging.getLogger(__name__)

_MOST_NAME = 200  # characters of a text's name
_MOST_BYTES = 100_000


@dataclass(frozen=True)
class Figure:
    """One figure, and what it was measured on."""

    value: float
    text: str  # its name
    digest: str  # of the ids of its windows: figures with the same one can be compared
    tokens: int
    against: str = ""  # the other model

    @property
    def basis(self) -> str:
        other = f" against {self.against}" if self.against else ""
        return f"{self.tokens:,} tokens of {self.text} (digest {self.digest or 'unknown'}){other}"


@dataclass(frozen=True)
class Figures:
    """The latest of each kind; None: not measured."""

    perplexity: Figure | None = None
    kl: Figure | None = None  # nats per token
    same_top: Figure | None = None  # share of positions with the same likeliest token, 0..1

    @property
    def texts(self) -> tuple[str, str, str]:
        """As a table shows them; a dash for what is missing."""
        return (
            "-" if self.perplexity is None else f"{self.perplexity.value:.4f}",
            "-" if self.kl is None else f"{self.kl.value:.6f}",
            "-" if self.same_top is None else f"{self.same_top.value:.2%}",
        )

    @property
    def basis(self) -> str:
        """What they were measured on, a sentence for each kind of measurement; "" if there are none."""
        found = [f"Perplexity: {self.perplexity.basis}."] if self.perplexity else []
        found += [f"KL divergence and agreement: {self.kl.basis}."] if self.kl else []
        return " ".join(found)


def digest_of(windows: Iterable[Sequence[int]]) -> str:
    """12 hexadecimal digits that stand for the windows of ids."""
    return hashlib.sha256(json.dumps([list(each) for each in windows]).encode()).hexdigest()[:12]


def figures(model: LocalModel) -> Figures:
    """What is known of the model's folder."""
    values: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        path = _path(model)
        if path.is_file() and path.stat().st_size <= _MOST_BYTES:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(values, dict) or values.get("commit") != commit_of(model):
        return Figures()
    return Figures(**{name: _figure(values.get(name)) for name in ("perplexity", "kl", "same_top")})


def remember(model: LocalModel, **found: Figure) -> None:
    """Keep figures, by the names of Figures' fields; the others stay. A disk that fails costs the figures only."""
    path = _path(model)
    kept = {**vars(figures(model)), **found}
    values = {name: asdict(each) for name, each in kept.items() if each is not None}
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"folder": str(model.folder), "commit": commit_of(model), **values}), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        log.warning("the figures of %s could not be saved in %s (%s)", model.name, path, error)


def _path(model: LocalModel) -> Path:
    name = hashlib.sha256(os.path.abspath(model.folder).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return data_folder() / "figures" / f"{name}.json"


def _figure(value: Any) -> Figure | None:
    """Of a file that somebody may have edited."""
    if not isinstance(value, Mapping):
        return None
    number, tokens = value.get("value"), value.get("tokens")
    if not isinstance(number, (int, float)) or not isinstance(tokens, int) or not math.isfinite(number):
        return None
    text, digest, against = (str(value.get(name, ""))[:_MOST_NAME] for name in ("text", "digest", "against"))
    return Figure(float(number), text, digest, tokens, against)
