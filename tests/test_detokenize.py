"""loaders/text/detokenize.py: never half a character, and the pieces are the whole text."""

import pytest
from transformers import AutoTokenizer

import tiny
from gptq_webui.loaders.text.detokenize import Detokenizer

TEXTS = ["Hello world", "naïve café — 日本語のテキスト", "🙂👩‍👩‍👧 flags 🇫🇷", "  two  spaces\n\ttab", ""]


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)  # one token a byte: every character but ASCII is split


@pytest.fixture(scope="module")
def words_tokenizer():
    """SentencePiece-like: the space belongs to the next word, and decoding drops the first one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: at for at, piece in enumerate(["<unk>", "▁Hello", "▁world", "▁", "!", "▁again"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_none_is_half_a_character(text, bytes_tokenizer):
    out = Detokenizer(bytes_tokenizer, [40, 41, 42])
    ids = bytes_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [out.feed(id) for id in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + out.end() == text


def test_an_incomplete_character_at_the_end_is_given_out_not_lost(bytes_tokenizer):
    out = Detokenizer(bytes_tokenizer)
    ids = bytes_tokenizer("ok é", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(out.feed(id) for id in ids) == "ok "
    assert out.end() == "\ufffd"


def test_a_space_that_belongs_to_a_word_is_kept(words_tokenizer):
    out = Detokenizer(words_tokenizer, [1])
    assert [out.feed(2), out.feed(4), out.feed(5)] == [" world", "!", " again"]


def test_special_tokens_have_no_text(bytes_tokenizer):
    out = Detokenizer(bytes_tokenizer)
    assert [out.feed(3), out.feed(1), out.end()] == ["", "", ""]


def test_a_special_token_that_is_part_of_the_text_is_shown():
    class Calls:
        names = ("</s>", "[CALL]", "▁Hi", "{", "}")

        def decode(self, ids, skip_special_tokens=False, **_):
            text = "".join(self.names[id] for id in ids if id > 1 or not skip_special_tokens).replace("▁", " ")
            return text.removeprefix(" ")  # as SentencePiece does

    out = Detokenizer(Calls(), [0], {1: "[CALL]"})
    assert [out.feed(id) for id in (2, 0, 1, 3, 4, 1, 2)] == ["Hi", "", "[CALL]", "{", "}", "[CALL]", "Hi"] and out.end() == ""
