"""The text that decides how weights are rounded: a file of the user, or the built-in one."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import BadParameter
from ..core.models import LocalModel
from ..core.units import plural
from ..loaders.text import chat_template
from ..loaders.text.chat_template import ChatTemplate
from ..loaders.text.renderers import TemplateFault, TemplateLimit
from .dataset_file import json_of, lines_of, pieces_of, text_of
from .demo_calibration import conversations, manual

log = logging.getLogger(__name__)

BUILT_IN = "built-in"
_CHARACTERS_PER_TOKEN = 8  # at most, on average: no more of a file than needed is read


def samples_of(
    dataset: str, model: LocalModel, tokenizer: Any, sample_tokens: int, samples: int, say: Callable[[str], None]
) -> tuple[list[list[int]], str]:
    """(token ids of up to `samples` pieces, `sample_tokens` each; what the text is, for the model card).

    `dataset` is BUILT_IN (Python's manual and a few conversations), a text file, or a .jsonl file whose lines have `text`,
    or `messages` that are written with the model's own chat template. The file is read from its start, as far as it is
    needed. `say` hears why that template cannot be used. Raises BadParameter if the file is missing, damaged or too short
    for one piece.
    """
    template = chat_template.find(model.folder, tokenizer, model.architecture)
    if template.note:
        say(template.note)
    try:
        return _samples_of(dataset, tokenizer, template if template.is_of_folder else None, sample_tokens, samples)
    finally:
        template.close()


def _samples_of(
    dataset: str, tokenizer: Any, template: ChatTemplate | None, sample_tokens: int, samples: int
) -> tuple[list[list[int]], str]:
    ids: list[int] = []
    path = Path(dataset).expanduser()
    texts = _built_in(template, tokenizer) if dataset == BUILT_IN else _file(path, template, tokenizer, sample_tokens * samples)
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= sample_tokens * samples:
            break
    pieces = [ids[at : at + sample_tokens] for at in range(0, len(ids) - sample_tokens + 1, sample_tokens)][:samples]
    if not pieces:
        raise BadParameter(
            f"The calibration text has {plural(len(ids), 'token')}, and one sample needs {sample_tokens}. "
            "Give a longer text (--dataset) or a smaller --seq-len."
        )
    return pieces, "Python's manual and a few conversations" if dataset == BUILT_IN else path.name


def _built_in(template: ChatTemplate | None, tokenizer: Any) -> Iterator[str]:
    if template is not None:
        try:
            yield from [template.whole(each, tokenizer) for each in conversations()]
        except (TemplateFault, TemplateLimit) as error:  # the manual is enough
            log.warning("the chat template of the model cannot show the built-in conversations: %s", error)
    yield from manual()


def _file(path: Path, template: ChatTemplate | None, tokenizer: Any, tokens: int) -> Iterator[str]:
    if path.suffix == ".jsonl":
        for where, line in lines_of(path, "--dataset"):
            yield from pieces_of(_of_line(line, template, tokenizer, where))
    else:
        yield from pieces_of(text_of(path, "--dataset", tokens * _CHARACTERS_PER_TOKEN))


def _of_line(line: str, template: ChatTemplate | None, tokenizer: Any, where: str) -> str:
    values = json_of(line, where, "each line must be an object with text or messages")
    if isinstance(values, dict) and isinstance(values.get("text"), str):
        return str(values["text"])
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(messages, list) or not all(_is_message(each) for each in messages):
        raise BadParameter(f"{where} has neither text nor messages (a list of role and content). Add one of them.")
    if template is None:
        raise BadParameter(f"{where} has messages, and the model has no chat template that can write them. Use text instead.")
    try:
        return template.whole(messages, tokenizer)
    except (TemplateFault, TemplateLimit) as error:
        raise BadParameter(
            f"{where}: the model's chat template cannot show these messages ({error}). Correct them, or choose another model."
        ) from None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
