"""How good a model is on a text, and how near to another model, for example to the 16-bit one that it was made from."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BadParameter, LoadRefused
from ..core.models import LocalModel
from ..core.units import plural
from ..gptq.text_windows import windows_of
from ..loaders.text.token_codec import TokenCodec
from .dataset_file import text_of
from .demo_calibration import manual
from .measured_quality import Figure, digest_of, remember

if TYPE_CHECKING:
    from ..gptq.quality import Difference

_MOST_CHARACTERS = 8  # of a text file, for each token that is wanted


@dataclass(frozen=True)
class Evaluation:
    tokens: int  # of text
    perplexity: float
    against_perplexity: float | None = None  # of the other model
    difference: "Difference | None" = None
    of: str = ""  # the name of the text
    digest: str = ""  # of its windows

    @property
    def text(self) -> str:
        """One sentence for each figure."""
        lines = [f"Perplexity {self.perplexity:.4f} over {self.tokens} tokens."]
        if self.difference is not None and self.against_perplexity is not None:
            lines[0] = lines[0][:-1] + f"; the other model's is {self.against_perplexity:.4f}."
            lines.append(f"KL divergence to the other model: {self.difference.kl:.6f} nats per token.")
            lines.append(f"The same likeliest token at {self.difference.same_top:.2%} of the positions.")
            lines += [
                f"Positions {each.first} to {each.last} of a window: {each.kl:.6f} nats, the same at {each.same_top:.2%}."
                for each in self.difference.by_position
            ]
        return "\n".join(lines)


def evaluate(
    model: LocalModel, against: LocalModel | None, text: Path | None, window: int, tokens: int, say: Callable[[str], None]
) -> Evaluation:
    """Measure `model` on the first `tokens` tokens of a UTF-8 file (without one: of Python's manual), in windows of `window`.

    Both models are read with plain packed layers, one after the other, and `model`'s tokenizer makes the ids of both.
    The figures are remembered (measured_quality.py). Raises BadParameter (no text, or too short), LoadRefused, and what
    loading raises.
    """
    _check(window, tokens, model, against)
    from ..loaders.text.tokenizer import read_tokenizer

    return _measured([model], against, _windows(read_tokenizer(model), text, window, tokens), _name(text), say)[0]


_STORED = "evaluation.json"  # in a folder of logits: what they are of


def keep(model: LocalModel, folder: Path, text: Path | None, window: int, tokens: int, say: Callable[[str], None]) -> Evaluation:
    """Measure `model` alone and write its logits into `folder`, for `evaluate_stored` on this machine or another.

    Needs `tokens` × vocabulary × 4 bytes there. Raises BadParameter (as `evaluate`, or the folder is there), LoadRefused.
    """
    _check(window, tokens, model)
    if folder.exists():
        raise BadParameter(f"{folder} is there already. Remove it, or choose another folder for the logits.")
    from ..gptq import quality
    from ..loaders.text.tokenizer import read_tokenizer

    windows = _windows(read_tokenizer(model), text, window, tokens)
    folder.mkdir(parents=True)
    perplexity = quality.store(_opened(model, say), windows, folder, _progress(say))
    facts = {"name": model.name, "perplexity": perplexity, "windows": windows, "text": _name(text)}
    (folder / _STORED).write_text(json.dumps(facts), encoding="utf-8")
    return _remembered(model, Evaluation(_count(windows), perplexity, None, None, _name(text), digest_of(windows)))


def is_stored(folder: Path) -> bool:
    """Whether `keep` has made it."""
    return (folder / _STORED).is_file()


def evaluate_stored(model: LocalModel, folder: Path, say: Callable[[str], None]) -> Evaluation:
    """Measure `model` against the logits that `keep` wrote, on the same token ids. Raises BadParameter, LoadRefused."""
    _check(2, 2, model)
    from ..gptq import quality

    try:
        facts = json.loads((folder / _STORED).read_text(encoding="utf-8-sig"))
        windows = [[int(id) for id in each] for each in facts["windows"]]
        other, against, name = float(facts["perplexity"]), str(facts["name"]), str(facts.get("text", "a text"))
        missing = [at for at in range(len(windows)) if not (folder / f"{at:05}.pt").is_file()]
    except (OSError, ValueError, KeyError, TypeError):
        windows, other, against, name, missing = [], 0.0, "", "", [0]
    if missing or not windows:
        raise BadParameter(f"The logits in {folder} are not whole. Make them again: gptq-webui evaluate ORIGINAL --keep FOLDER.")
    perplexity, difference = quality.measure(_opened(model, say), windows, folder, _progress(say))
    found = Evaluation(_count(windows), perplexity, other, difference, name, digest_of(windows))
    return _remembered(model, found, against)


def evaluate_made(
    made: Sequence[LocalModel], original: LocalModel, window: int, tokens: int, say: Callable[[str], None]
) -> list[Evaluation]:
    """The same of several models that were made of one `original`, on Python's manual; the original is read once.

    Needs `tokens` × vocabulary × 4 bytes on disk while it runs. Raises as `evaluate`.
    """
    from ..loaders.text.tokenizer import read_tokenizer

    return _measured(made, original, _windows(read_tokenizer(original), None, window, tokens), _name(None), say)


def _check(window: int, tokens: int, *models: LocalModel | None) -> None:
    if window < 2 or tokens < window:
        raise BadParameter("--window must be 2 tokens or more, and --tokens at least one window.")
    for each in models:
        if each is not None and each.kind not in ("gptq", "plain"):
            raise LoadRefused(f"{each.name} is {each.badge}; only GPTQ and 16-bit folders on this machine can be measured.")


def _opened(model: LocalModel, say: Callable[[str], None]) -> Any:
    import torch

    from ..gptq import checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(f"Reading {model.name}")
    return checkpoint.load(model, dtype=torch.float16 if device == "cuda" else torch.float32, device_map=device)[0]


def _progress(say: Callable[[str], None]) -> Callable[[int, int], None]:
    def progress(done: int, count: int) -> None:
        if done == count or done % 10 == 0:
            say(f"{done} of {count} windows")

    return progress


def _count(windows: list[list[int]]) -> int:
    return sum(len(each) - 1 for each in windows)  # each first token is context only


def _measured(
    models: Sequence[LocalModel],
    against: LocalModel | None,
    windows: list[list[int]],
    name: str,  # of the text
    say: Callable[[str], None],
) -> list[Evaluation]:
    from ..gptq import quality

    count, progress, digest = _count(windows), _progress(say), digest_of(windows)
    if against is None:
        alone = ((each, quality.measure(_opened(each, say), windows, None, progress)[0]) for each in models)
        return [_remembered(each, Evaluation(count, perplexity, None, None, name, digest)) for each, perplexity in alone]
    with tempfile.TemporaryDirectory(prefix="gptq-webui-") as folder:
        other = quality.store(_opened(against, say), windows, Path(folder), progress)
        measured = ((each, *quality.measure(_opened(each, say), windows, Path(folder), progress)) for each in models)
        return [
            _remembered(each, Evaluation(count, perplexity, other, difference, name, digest), against.name)
            for each, perplexity, difference in measured
        ]


def _name(text: Path | None) -> str:
    return "Python's manual" if text is None else text.name


def _remembered(model: LocalModel, found: Evaluation, against: str = "") -> Evaluation:
    """The same, kept for the table of branches and the list of models."""
    basis = (found.of, found.digest, found.tokens)
    figures = {"perplexity": Figure(found.perplexity, *basis)}
    if (difference := found.difference) is not None:
        figures |= {name: Figure(getattr(difference, name), *basis, against) for name in ("kl", "same_top")}
    remember(model, **figures)
    return found


def default_text() -> str:
    """Python's manual: it is on every machine. The beginning is not what calibration takes first."""
    return "\n\n".join(reversed(list(manual())))


def _windows(tokenizer: Any, path: Path | None, window: int, tokens: int) -> list[list[int]]:
    """Side by side, each of the whole length, with the beginning-of-sequence token where the model uses one."""
    ids: list[int] = []
    for part in [text_of(path, "--text", tokens * _MOST_CHARACTERS)] if path is not None else reversed(list(manual())):
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            break
    begin = TokenCodec(tokenizer).with_bos([])
    found = [list(each.ids) for each in windows_of(ids[:tokens], window, window, begin) if len(each.ids) == window]
    if not found:
        raise BadParameter(f"The text has {plural(len(ids), 'token')}; one window needs {window}. Give a longer text (--text).")
    return found
