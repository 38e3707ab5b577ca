"""loaders/text/tokenizer_probe.py: a tokenizer that makes long texts of short ones is refused before it reads one."""
# ruff: noqa: F811 (fixtures of another file)

import time

import pytest
from test_tokenizer_files import edit, folder, pieces, read  # noqa: F401

from gptq_webui.core.errors import GptqWebuiError
from gptq_webui.loaders.text import tokenizer_probe, tokenizer_trial


def times(kind, letter, more, count):
    each = {"type": "Replace", "pattern": {"String": letter}, "content": letter * more}
    return {kind: {"type": "Sequence", f"{kind}s": [each] * count}}


@pytest.mark.parametrize("change", [
    times("normalizer", "Q", 100, 5), times("decoder", "q", 100, 4), times("normalizer", "QQ", 1000, 2),
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "Z?"}, "content": "z" * 1000}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "W"}, "content": "WWWWWWWWWW"}] * 3}] * 3}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 1000}] * 100}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000,
                        "pair": [{"Sequence": {"id": at, "type_id": 0}} for at in "AB"], "special_tokens": {}}},
    {"post_processor": {"type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [{"Sequence": {"id": at, "type_id": 0}} for at in "AB"],
                        "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 100_000, "tokens": ["<s>"] * 100_000}}}},
], ids=lambda each: next(iter(each)))  # fmt: skip
def test_a_file_that_multiplies_texts_is_a_sentence(folder, change):
    """Even if the texts that are tried do not have the letter: one message with it would take all memory."""
    edit(folder / "tokenizer.json", lambda values: values.update(change))
    with pytest.raises(GptqWebuiError, match=r"made to do harm: it (makes a text up to|adds) .*were? expected|was expected"):
        read(folder)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
    {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}]}},
    {"decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}},
], ids=["llama", "t5", "decoder"])  # fmt: skip
def test_what_tokenizers_do_to_texts_is_read(folder, change):
    edit(folder / "tokenizer.json", lambda values: values.update(change))
    assert read(folder).encode("hello")


LONG = "x" * 5_000


@pytest.mark.parametrize(("name", "change"), [
    ("tokenizer.json", {"added_tokens": [{"id": 5000, "content": LONG, "special": True, "single_word": False,
                                          "lstrip": False, "rstrip": False, "normalized": False}]}),
    ("tokenizer_config.json", {"bos_token": LONG}), ("tokenizer_config.json", {"pad_token": {"content": LONG}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"5000": {"content": LONG, "special": True}}}),
    ("tokenizer_config.json", {"additional_special_tokens": ["<x>", LONG]}),
    ("special_tokens_map.json", {"eos_token": LONG}), ("added_tokens.json", {LONG: 5000}),
], ids=lambda each: each if isinstance(each, str) else next(iter(each))[:20])  # fmt: skip
def test_a_token_of_megabytes_is_a_sentence(folder, name, change):
    path = folder / name
    if not path.is_file():
        path.write_text("{}")
    edit(path, lambda values: values.update(change))
    with pytest.raises(GptqWebuiError, match=rf"{name}.* token.* 5,?000 characters, and at most 2,?000 were expected"):
        read(folder)


def test_many_texts_that_each_take_long_are_a_sentence(folder, monkeypatch):
    def slow_text(child, request, limit_s, most_bytes):
        limits.append(limit_s)
        time.sleep(0.05 if "text" in request else 0.5)
        if "text" in request and limit_s < 0.05:
            raise tokenizer_trial.ChildEnded("it took too long")
        return {"count": 1}

    limits = []
    monkeypatch.setattr(tokenizer_trial.Child, "ask", slow_text)
    monkeypatch.setattr(tokenizer_trial, "_TEXTS_S", 0.3)
    with pytest.raises(GptqWebuiError, match="it took too long"):
        read(folder)
    assert limits[0] == tokenizer_trial._READ_S and 2 < len(limits) < 10 and limits[1] <= 0.3


def test_a_sentencepiece_model_that_makes_a_long_text_of_a_letter_is_a_sentence(pieces):
    folder, model = pieces
    real = model.normalizer_spec.precompiled_charsmap
    assert 1 < tokenizer_probe._longest_of(real) < 30
    model.normalizer_spec.precompiled_charsmap = real + b"long " * 10_000 + b"\0"
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(GptqWebuiError, match=r"it makes a text up to 5e\+04 times as long"):
        read(folder)


@pytest.mark.parametrize("kind", ["T5Tokenizer", "LlamaTokenizer"])
@pytest.mark.parametrize("table", [b"\x04\0\0\0\xff\xff\xff\xff", b"\xff" * 50, b"\0\0\x10\0" + bytes(range(256)) * 4096])
def test_a_damaged_table_of_a_sentencepiece_model_is_a_sentence_or_of_no_use(pieces, kind, table):
    """Rust panics at the first text that is read with it."""
    folder, model = pieces
    model.normalizer_spec.precompiled_charsmap = table
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}"}}')
    try:
        assert read(folder).encode("hello")
    except GptqWebuiError as error:
        assert "tokenizer" in str(error) and "Panic" not in str(error)
