"""loaders/text/fill_in_middle.py: the prompt of each family of code models, by the marks that its tokenizer has."""

import pytest

from gptq_webui.core.errors import BadParameter
from gptq_webui.loaders.text.fill_in_middle import fill_in_middle


class Codec:
    """A token for each character, and the marks; `▁` before a text as sentencepiece has it."""

    def __init__(self, marks, dummy=""):
        self._names, self._dummy = ["<s>", *marks], dummy

    def id_of(self, name):
        return self._names.index(name) if name in self._names else None

    def encode(self, text, *, bos=True):
        return [1000 + ord(each) for each in self._dummy + text]

    def with_bos(self, ids):
        return [0, *ids]

    def shown(self, ids):
        return "".join(self._names[each] if each < 1000 else chr(each - 1000) for each in ids)


@pytest.mark.parametrize(
    ("marks", "dummy", "wanted", "ends"),
    [
        (
            ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
            "",
            "<|fim_prefix|>ab<|fim_suffix|>yz<|fim_middle|>",
            1,
        ),
        (("<fim_prefix>", "<fim_middle>", "<fim_suffix>"), "", "<fim_prefix>ab<fim_suffix>yz<fim_middle>", 0),
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "", "<｜fim▁begin｜>ab<｜fim▁hole｜>yz<｜fim▁end｜>", 0),
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), "▁", "▁<PRE>▁ab▁<SUF>yz▁<MID>", 1),
        (("[PREFIX]", "[SUFFIX]"), "▁", "[SUFFIX]▁yz[PREFIX]▁ab", 0),
    ],
    ids=["Qwen-Coder, CodeGemma", "StarCoder", "DeepSeek-Coder", "CodeLlama", "Codestral"],
)
def test_each_family(marks, dummy, wanted, ends):
    codec = Codec(marks, dummy)
    ids, found = fill_in_middle(codec, "ab", "yz")
    assert codec.shown(ids) == "<s>" + wanted and len(found) == ends


def test_a_model_without_marks_is_refused_in_words():
    with pytest.raises(BadParameter, match="no marks for it"):
        fill_in_middle(Codec(("<|fim_prefix|>",)), "ab", "yz")
