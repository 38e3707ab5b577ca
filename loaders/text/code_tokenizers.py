"""Tokenizers of 2023 that came as program code beside a vocabulary, read from the vocabulary alone: the code is not run.

The vocabulary is a model of sentencepiece (Baichuan, InternLM, ChatGLM 2 and 3), a list for tiktoken (Qwen, GLM-4), or a
tokenizer.json that needs no code. What their code does beside that is known here by the name of its class.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import BadFile
from ...core.folder_files import SMALL_FILE_BYTES, read_bytes, read_json, read_text, shown_name
from . import sentencepiece_file, tiktoken_file
from .token_codec import BEGINS_WITH

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_SETTINGS = (*_ROLES, "model_max_length", "padding_side")  # of tokenizer_config.json, that are kept


@dataclass(frozen=True)
class _Kind:
    """What the code of a class adds to its vocabulary."""

    after: tuple[str, ...] = ()  # special tokens that follow the vocabulary
    eos: str | None = None
    pad: str | None = None
    begins: bool = True  # whether a text begins with its bos token, where the settings do not say
    begins_with: tuple[str, ...] = ()  # what a text begins with, where that is more than a bos token
    words: str = ""  # of tiktoken's: what a text is cut into
    composed: bool = False  # of tiktoken's: letters and their accents are put together first
    roles: Callable[[Path], tuple[int, ...]] = lambda folder: ()  # ids of pieces that begin a message


def _baichuan_roles(folder: Path) -> tuple[int, ...]:
    settings = read_json(folder / "generation_config.json")
    found = (settings.get(name, default) for name, default in (("user_token_id", 195), ("assistant_token_id", 196)))
    return tuple(each for each in found if isinstance(each, int))


_GLM_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
_KINDS: Mapping[str, _Kind] = {
    "QWenTokenizer": _Kind(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{at}|>" for at in range(205))),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        words=tiktoken_file.WORDS % "",
        composed=True,
    ),
    "ChatGLM4Tokenizer": _Kind(
        ("<|endoftext|>", *_GLM_MASKS, *_GLM_ROLES, *_GLM_MEDIA),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        words=tiktoken_file.WORDS % "{1,3}",
        begins_with=("[gMASK]", "<sop>"),
    ),
    "ChatGLMTokenizer": _Kind((*_GLM_MASKS, *_GLM_ROLES), begins=False, begins_with=("[gMASK]", "<sop>")),
    "BaichuanTokenizer": _Kind(roles=_baichuan_roles),
}


def made_of(folder: Path) -> Any:
    """The tokenizer of a folder that has it as code, as a fast transformers tokenizer; None for every other folder.

    Raises BadFile for a vocabulary that is damaged.
    """
    settings, config = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or "")
    if not _is_code(settings, config) or _is_known(name):
        return None
    kind = _KINDS.get(name, _Kind())
    backend, named = _backend(folder, settings, kind)
    if backend is None:
        return None
    from transformers import PreTrainedTokenizerFast

    options = {key: value for key in _SETTINGS if (value := settings.get(key)) is not None}
    options |= {role: text for role in _ROLES if (text := _text(settings.get(role)) or named.get(role)) and _has(backend, text)}
    options |= {"chat_template": template} if (template := _template(folder, settings)) is not None else {}
    bos = options.get("bos_token")
    if bos is not None and named and settings.get("add_bos_token", kind.begins):
        from tokenizers import processors

        post: Any = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = post
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)
    if all(_has(backend, each) for each in kind.begins_with):
        vars(made)[BEGINS_WITH] = [backend.token_to_id(each) for each in kind.begins_with]
    return made


def _is_code(settings: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether the folder names program code for its tokenizer."""
    maps = (each.get("auto_map") for each in (settings, config))
    return any(isinstance(each, list) or (isinstance(each, Mapping) and "AutoTokenizer" in each) for each in maps)


def _is_known(name: str) -> bool:
    """Whether transformers has a class of this name."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return bool(name) and tokenizer_class_from_name(name) is not None


def _backend(folder: Path, settings: Mapping[str, Any], kind: _Kind) -> tuple[Any, dict[str, str]]:
    """(the library's tokenizer, role -> token by the vocabulary itself); (None, {}) where the folder has no vocabulary."""
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_str(read_text(folder / "tokenizer.json", 4 * SMALL_FILE_BYTES)), {}
    path = next(iter([*sorted(folder.glob("*.tiktoken")), *sorted(folder.glob("*.model"))]), None)
    if path is None:
        return None, {}
    given = _added(settings)
    pieces = sentencepiece_file.read(path) if path.suffix == ".model" else None
    if pieces is not None:
        size = len(pieces.texts)
        special = pieces.control | {id: pieces.texts[id] for id in kind.roles(folder) if id < size}
        special |= {size + at: text for at, text in enumerate(kind.after)} | given
        named = {f"{role}_token": text for role in ("bos", "eos", "pad", "unk") if (text := pieces.named(role)) is not None}
        named = {role: special.get(pieces.texts.index(text), text) for role, text in named.items()}
        return sentencepiece_file.tokenizer_of(pieces, _at_their_ids(special, size, path)), named
    if path.suffix == ".model" and not kind.words:
        raise BadFile(f"{shown_name(path)} is no model of sentencepiece. Download it again.")
    ranks = tiktoken_file.ranks_of(read_bytes(path, 4 * SMALL_FILE_BYTES), shown_name(path))
    special = {len(ranks) + at: text for at, text in enumerate(kind.after)} | given
    special = _at_their_ids({id: text for id, text in special.items() if id >= len(ranks)}, len(ranks), path)
    words = kind.words or _KINDS["QWenTokenizer"].words
    backend = tiktoken_file.tokenizer_of(ranks, [special[id] for id in sorted(special)], words, composed=kind.composed)
    return backend, {role: text for role, text in (("eos_token", kind.eos), ("pad_token", kind.pad)) if text is not None}


def _added(settings: Mapping[str, Any]) -> dict[int, str]:
    """Id -> special token, as tokenizer_config.json lists them."""
    listed = settings.get("added_tokens_decoder")
    found = {}
    for id, token in listed.items() if isinstance(listed, Mapping) else ():
        if str(id).isdecimal() and isinstance(token, Mapping) and isinstance(text := token.get("content"), str):
            found[int(id)] = text
    return found


def _at_their_ids(special: Mapping[int, str], size: int, path: Path) -> dict[int, str]:
    """The special tokens, which must follow a vocabulary of `size` tokens without a gap. Raises BadFile."""
    after = sorted(id for id in special if id >= size)
    if after != list(range(size, size + len(after))):
        raise BadFile(
            f"tokenizer_config.json lists the special token {after[-1]}, and {shown_name(path)} has {size:,} tokens: between "
            "them some are missing. Download the model again."
        )
    return dict(special)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The folder's chat template, or several by name."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    given = settings.get("chat_template")
    if isinstance(given, list):
        return {each["name"]: each["template"] for each in given if isinstance(each, dict) and {"name", "template"} <= set(each)}
    return given if isinstance(given, (str, dict)) else None


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) and found else None


def _has(backend: Any, text: str) -> bool:
    return backend.token_to_id(text) is not None
