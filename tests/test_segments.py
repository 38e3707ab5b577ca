"""loaders/text/segments.py: segments give the ids of the whole text, or are not used."""

import random

import pytest

from gptq_webui.loaders.text.segments import Segments

SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>"]
PIECES = ["the sea", " ", "  two", "\n", "\n\n", "é日本", "a", "ab", "it's", "<|", "user|>", "<s", "\t", "x " * 30]


def tokenizer_of(kind, tokens=tuple(SPECIAL), **options):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "bytes"))
    tokens = [each if isinstance(each, AddedToken) else AddedToken(each, special=True, normalized=False) for each in tokens]
    alphabet = []
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix_space", False))
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=options["scheme"], split=False)
    else:  # as Llama 2's before 2024
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the sea is wide and it's two or ab user end s"] * 50, trainer)
    tokenizer.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def segments_of(tokenizer):
    def encode(texts):
        calls.append(texts)
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    calls = []
    return Segments(tokenizer, encode), calls


def added(text, **options):
    from tokenizers import AddedToken

    return AddedToken(text, special=True, normalized=False, **options)


KINDS = {
    "bytes": lambda: tokenizer_of("bytes"),
    "bytes with a space first": lambda: tokenizer_of("bytes", prefix_space=True),
    "metaspace first": lambda: tokenizer_of("metaspace", scheme="first"),
    "metaspace always": lambda: tokenizer_of("metaspace", scheme="always"),
    "metaspace never": lambda: tokenizer_of("metaspace", scheme="never"),
    "prepending": lambda: tokenizer_of("prepending"),
    "a token that takes the space after it": lambda: tokenizer_of("bytes", [*SPECIAL[:3], added("<|end|>", rstrip=True)]),
    "a token that takes the space before it": lambda: tokenizer_of("bytes", [*SPECIAL[:3], added("<|end|>", lstrip=True)]),
    "a token that begins as another": lambda: tokenizer_of("bytes", [*SPECIAL, "<|user|>s"]),
    "a word alone": lambda: tokenizer_of("bytes", [*SPECIAL[:3], added("<|end|>", single_word=True)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_segments_give_the_ids_of_the_whole_text(kind):
    tokenizer = KINDS[kind]()
    segments, _calls = segments_of(tokenizer)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice([*PIECES, *SPECIAL]) for _ in range(rng.randint(0, 25)))
        assert segments.ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_a_segment_is_tokenised_once():
    segments, calls = segments_of(tokenizer_of("bytes"))
    calls.clear()
    first = segments.ids("<s><|user|>the sea<|end|>")
    assert calls == [["<s>", "<|user|>the sea", "<|end|>"]]
    assert segments.ids("<s><|user|>the sea<|end|><|user|>again")[: len(first)] == first
    assert calls[1:] == [["<|user|>again"]]


@pytest.mark.parametrize("change", ["slow", "own code", "no special tokens", "splits special tokens"])
def test_other_tokenizers_read_the_whole_text(change):
    tokenizer = tokenizer_of("bytes", ["</s>", "<s>"] if change != "no special tokens" else [])
    if change == "own code":
        tokenizer.__class__ = type("Own", (type(tokenizer),), {"__module__": "somewhere.else"})
    if change == "splits special tokens":
        tokenizer.split_special_tokens = True
    if change == "slow":
        tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False, "__module__": "transformers.slow"})
    if change == "no special tokens":
        tokenizer = tokenizer_of("bytes", [])
        tokenizer.__class__ = type("Bare", (type(tokenizer),), {"added_tokens_decoder": {}, "__module__": "transformers.bare"})
    segments, calls = segments_of(tokenizer)
    calls.clear()
    segments.ids("<s>a<s>b")
    assert calls == [["<s>a<s>b"]]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr("gptq_webui.loaders.text.segments._KEPT_IDS", 100)
    segments, calls = segments_of(tokenizer_of("bytes"))
    for at in range(50):
        segments.ids(f"<s>{at} the sea<|end|>")
    assert segments._kept_ids <= 100 and segments._kept_ids == sum(map(len, segments._kept.values()))
    calls.clear()
    segments.ids("<s>0 the sea<|end|>")
    assert calls[0][0] == "<s>0 the sea"
