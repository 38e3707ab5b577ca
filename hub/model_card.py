"""The facts of a model card about a repository's branches: its front matter and its table of "Provided files".

People write model cards: what cannot be read is left out, never an error. The
repository's own files count more (branches.py).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# A stranger's text: each search ends after so many letters, and a line or a front matter that is longer is none.
_LINK = re.compile(r"\[([^\[\]]{0,500})\]\([^()\s]{0,2000}\)")
_MOST = 1_000_000  # characters
_LONGEST_LINE = 10_000
_LONGEST_FRONT = 50_000  # a second's reading; those with prompt templates have up to 2,000
_RULE = re.compile(r"^\s*\|?\s*:?-{2,}")
_EXPECTED = ("branch", "bits")  # the columns by which this table is recognised
_COLUMNS = {
    "branch": "branch", "bits": "bits", "gs": "group_size", "group size": "group_size", "act order": "act_order",
    "damp %": "damp_percent", "damp": "damp_percent", "gptq dataset": "dataset", "dataset": "dataset", "seq len": "seq_len",
    "size": "size", "exllama": "exllama", "exllama compatibility": "exllama", "desc": "description", "description": "description",
}  # fmt: skip


@dataclass(frozen=True)
class ModelCardRow:
    """One line of the table, as it is written; "" for a column that the table does not have."""

    branch: str
    bits: str = ""
    group_size: str = ""
    act_order: str = ""
    damp_percent: str = ""
    dataset: str = ""
    seq_len: str = ""
    size: str = ""
    exllama: str = ""
    description: str = ""


@dataclass(frozen=True)
class ModelCard:
    front: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, ModelCardRow] = field(default_factory=dict)  # by branch

    def text(self, key: str) -> str:
        """A value of the front matter that is plain text, else ""; the first of a list."""
        value = self.front.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        return value.strip() if isinstance(value, str) else ""


def read_model_card(text: str) -> ModelCard:
    text = text[:_MOST]
    return ModelCard(_front_matter(text), {row.branch: row for row in _rows(text)})


def _front_matter(text: str) -> Mapping[str, Any]:
    import yaml

    begin = text.lstrip("\ufeff \t\r\n")
    end = begin.find("\n---", 3, _LONGEST_FRONT)
    if not begin.startswith("---") or end < 0:
        return {}
    try:
        found = yaml.safe_load(begin[begin.find("\n") + 1 : end])
        return found if isinstance(found, dict) else {}
    except Exception:  # whatever is in it, the table below may still be readable
        return {}


def _rows(text: str) -> list[ModelCardRow]:
    lines = [line for line in text.splitlines() if len(line) <= _LONGEST_LINE]
    for at, line in enumerate(lines[:-1]):
        names = [_COLUMNS.get(cell.lower(), "") for cell in _cells(line)]
        if all(name in names for name in _EXPECTED) and _RULE.match(lines[at + 1]):
            return _read_rows(names, lines[at + 2 :])
    return []


def _read_rows(names: Sequence[str], lines: Sequence[str]) -> list[ModelCardRow]:
    rows = []
    for line in lines:
        if "|" not in line:
            break
        values = {name: cell for name, cell in zip(names, _cells(line), strict=False) if name}
        if values.get("branch"):
            rows.append(ModelCardRow(**values))
    return rows


def _cells(line: str) -> list[str]:
    plain = _LINK.sub(r"\1", line).strip().strip("|")
    return [cell.strip().strip("`*").strip() for cell in plain.split("|")]
