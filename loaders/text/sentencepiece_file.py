"""A model of sentencepiece as a tokenizer of the library `tokenizers`: its pieces, and the form that it gives to a text.

Special tokens are found in a text before anything else, and what is between two of them is read alone, as the programs of 2023
did it.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import BadFile
from ...core.folder_files import shown_name

_NORMAL, _UNKNOWN, _CONTROL, _OF_USER = 1, 2, 3, 4  # types of pieces
_UNIGRAM, _BPE = 1, 2
_ALL_LETTERS = 16_000_000  # of all pieces together; those of the largest vocabularies have two million


@dataclass(frozen=True)
class Pieces:
    """What a file says."""

    proto: Any  # sentencepiece's ModelProto
    texts: tuple[str, ...]

    @property
    def control(self) -> dict[int, str]:
        """Id -> piece that no text contains: <s>, </s>."""
        return {id: each.piece for id, each in enumerate(self.proto.pieces) if each.type == _CONTROL}

    def named(self, role: str) -> str | None:
        """The piece that begins ("bos"), ends ("eos") or fills ("pad") a text, or stands for what is unknown ("unk")."""
        id = getattr(self.proto.trainer_spec, f"{role}_id")
        return self.texts[id] if 0 <= id < len(self.texts) else None


def read(path: Path) -> Pieces | None:
    """None for a file of another library. Raises BadFile."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    formats: Any = sentencepiece_model_pb2
    proto = formats.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        return None
    if not proto.pieces or proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        return None
    texts = tuple(each.piece for each in proto.pieces)
    if sum(map(len, texts)) > _ALL_LETTERS:
        raise BadFile(f"The pieces of {shown_name(path)} are too long for a vocabulary. Choose another model.")
    return Pieces(proto, texts)


def tokenizer_of(pieces: Pieces, special: Mapping[int, str]) -> Any:
    """`special`: id -> text of special tokens, which may stand in the place of a piece."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto, form = pieces.proto, pieces.proto.normalizer_spec
    texts = dict(enumerate(pieces.texts)) | dict(special)
    of_user = [texts[id] for id, each in enumerate(proto.pieces) if each.type == _OF_USER and id not in special]
    bytes_too, unknown = proto.trainer_spec.byte_fallback, proto.trainer_spec.unk_id
    model: Any
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = {id: each.score for id, each in enumerate(proto.pieces)}
        model = models.Unigram([(texts[id], scores.get(id, 0.0)) for id in sorted(texts)], unknown, bytes_too)
    else:
        ids = {text: id for id, text in texts.items()}
        model = models.BPE(
            ids,
            _merges(proto, texts, special),
            unk_token=texts[unknown],
            fuse_unk=True,
            byte_fallback=bytes_too,
            ignore_merges=bool(of_user),
        )
    tokenizer: Any = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(form.precompiled_charsmap)] if form.precompiled_charsmap else []
    space = " "
    if form.escape_whitespaces:
        steps.append(normalizers.Replace(space, space := "▁"))
    if form.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A{space}+|{space}+\z"), ""))
        steps.append(normalizers.Replace(Regex(f"{space}{{2,}}"), space))
    if form.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if of_user:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_one_of(of_user)), "isolated")
    out: list[Any] = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if bytes_too else []), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*out, *([decoders.Strip(" ", 1, 0)] if form.add_dummy_prefix else [])])
    tokenizer.add_special_tokens([AddedToken(special[id], special=True, normalized=False) for id in sorted(special)])
    return tokenizer


def _merges(proto: Any, texts: Mapping[int, str], special: Mapping[int, str]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece together, the one with the highest score first."""
    normal = {texts[id]: (-each.score, id) for id, each in enumerate(proto.pieces) if each.type == _NORMAL and id not in special}
    found = [
        (*order, text[:at], text[at:])
        for text, order in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [(before, after) for _score, _id, before, after in sorted(found)]


def _one_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of some texts; those that begin alike are looked at together."""
    by_start = itertools.groupby(sorted(texts), key=lambda each: each[:2])
    groups = {start: sorted((each[2:] for each in group), key=len, reverse=True) for start, group in by_start}
    starts = sorted(groups, key=len, reverse=True)
    return "|".join(f"{re.escape(start)}(?:{'|'.join(map(re.escape, groups[start]))})" for start in starts)
