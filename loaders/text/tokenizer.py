"""The tokenizer of a model folder, for every loader that works with ids."""

import json
import logging
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...core import folder_files
from ...core.errors import BadCheckpoint, BadFile
from ...core.foreign_errors import in_words, trace
from ...core.models import LocalModel
from ...core.readable_folder import readable, without_bom
from . import code_tokenizers, tokenizer_trial

log = logging.getLogger(__name__)

_JSON = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json")
_OBJECTS = ("tokenizer_object", "__slow_tokenizer", "from_slow", "init_inputs")  # arguments that no file needs
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(?:json|txt)|.*\.(?:model|tiktoken)|tekken\.json")
_LONGEST_TOKEN = 2000  # characters; real ones have up to 128
_SAMPLE = "The capital of France is Paris, and 2 + 2 = 4. 日本"
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_tokenizer(model: LocalModel, *, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer. Raises BadFile or BadCheckpoint with a sentence."""
    changed = _changed_files(model.folder)
    if (model.folder / "tokenizer.json").is_file():
        with readable(model.folder, {name: text for name, text in changed.items() if name == "tokenizer.json"}) as folder:
            if problem := tokenizer_trial.problem(folder / "tokenizer.json"):
                raise BadCheckpoint(
                    f"The tokenizer.json of {model.name} is damaged, or made to do harm: {problem}. "
                    "Download the model again, or take it from another author."
                )
    else:
        for path in sorted(model.folder.glob("*.model")):
            if path.is_file() and (problem := tokenizer_trial.problem(path)):
                raise BadCheckpoint(
                    f"The {folder_files.shown_name(path)} of {model.name} is damaged, or made to do harm: {problem}. "
                    "Download the model again, or take it from another author."
                )
    from transformers import AutoTokenizer

    try:
        made = None if trust_remote_code else code_tokenizers.made_of(model.folder)
        if made is not None:
            return made
        with readable(model.folder, changed) as folder:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        has_words = not found.vocab_files_names or _reads(found)
    except BadFile:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3's is no Exception
            raise
        log.error("the tokenizer of %s cannot be read\n%s", model.name, trace(error))
        raise BadCheckpoint(
            f"The tokenizer of {model.name} cannot be read: {_cause(model.folder) or in_words(error)}. "
            "Download the model again; what is complete is kept."
        ) from error
    if not has_words:  # transformers makes one without a vocabulary, and says nothing
        raise BadCheckpoint(
            f"The tokenizer of {model.name} knows no words: {_cause(model.folder) or 'its files have none'}. "
            "Download the model again; what is complete is kept."
        )
    return found


def _reads(tokenizer: Any) -> bool:
    """Whether ordinary text becomes tokens other than the one for what is unknown."""
    ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    unknown = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(["▁", " "])}
    return any(id not in unknown for id in ids)


def _cause(folder: Path) -> str:
    """What is wrong with the files that have the vocabulary, to stand in a sentence; empty if they look right."""
    names = [each.name for each in folder.iterdir() if each.is_file() and _VOCABULARY.fullmatch(each.name)]
    if not names:
        return "the folder has no tokenizer.json, tokenizer.model or vocab.json, one of which was expected"
    for name in sorted(names):
        data = folder_files.read_bytes(folder / name, 4 * folder_files.SMALL_FILE_BYTES)
        shown = folder_files.printable(name)
        if not data.strip():
            return f"{shown} is empty"
        if data.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
            return f"{shown} is a web page instead of the file itself"
        if name.endswith(".json"):
            try:
                folder_files.json_object(data.decode("utf-8-sig"), shown)
            except (BadFile, UnicodeDecodeError) as error:
                return in_words(error).removesuffix(". Download it again")
    return ""


def _changed_files(folder: Path) -> dict[str, str]:
    """The files of the tokenizer that libraries cannot read as they are -> their text as libraries can. Raises BadFile.

    A byte order mark is left off; special tokens as objects, as transformers wrote them in 2023, become what it reads now.
    """
    changed = {name: text for name, text in without_bom(folder).items() if name in _JSON}
    for name in _JSON:
        path = folder / name
        if not path.is_file():
            continue
        data = folder_files.read_bytes(path, 4 * folder_files.SMALL_FILE_BYTES)
        if name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            values = folder_files.read_json(path)
            if (longest := _longest_token(values, name)) > _LONGEST_TOKEN:
                raise BadFile(
                    f"{name} names a token of {longest:,} characters, and at most {_LONGEST_TOKEN:,} were expected. "
                    "Download it again, or take the model from another author."
                )
            if name != "added_tokens.json" and (readable := _with_readable_lists(_without_files(values))) != values:
                changed[name] = json.dumps(readable)
        elif folder_files.is_lfs_pointer(data[:1024]):
            raise BadFile(folder_files.lfs_sentence(path))
    for path in folder.glob("*.model"):
        if folder_files.is_lfs_pointer_file(path):
            raise BadFile(folder_files.lfs_sentence(path))
    return changed


def _longest_token(values: dict[str, Any], name: str) -> int:
    """The characters of the longest token in the settings of a tokenizer: libraries take minutes for one of megabytes."""
    own = values if name == "added_tokens.json" else {}
    tokens = [value for key, value in values.items() if key.endswith(("_token", "_tokens")) or key == "added_tokens_decoder"]
    return max((len(each) for each in (*own, *_strings(tokens))), default=0)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _without_files(values: dict[str, Any]) -> dict[str, Any]:
    """The settings without names of other files: those of a folder have their usual names, and only those were tried."""
    return {key: value for key, value in values.items() if not key.endswith(("_file", "_files")) and key not in _OBJECTS}


def _with_readable_lists(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with their lists of special tokens as the installed transformers reads them.

    Tokens as objects become texts. transformers 4 wants names in `extra_special_tokens`: a list there, as transformers 5
    writes it, belongs to the additional ones.
    """
    lists = {key: values[key] for key in _LISTS if isinstance(values.get(key), list)}
    if not lists:
        return values
    changed = values | {key: [each if _is_added_token(each) else _text(each) for each in tokens] for key, tokens in lists.items()}
    if "extra_special_tokens" in lists and version("transformers").startswith("4."):
        more = changed.pop("extra_special_tokens")
        kept = [each for each in changed.get("additional_special_tokens") or [] if each not in more]
        changed["additional_special_tokens"] = kept + more
    return changed


def _is_added_token(token: Any) -> bool:
    return isinstance(token, dict) and "__type" in token


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) and isinstance(token.get("content"), str) else token


def end_ids(*sources: Any) -> set[int]:
    """Every id that ends an answer, from generation settings and tokenizers: whatever has an `eos_token_id`."""
    ids: set[int] = set()
    for source in sources:
        found = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        ids.update(found if isinstance(found, (list, tuple)) else [found] if found is not None else [])
    return ids
