"""Tokenizers that came as program code beside their vocabulary give the ids of that vocabulary's library, without the code."""

import base64
import io
import itertools
import json
import random
import unicodedata

import pytest
import regex
import sentencepiece

from gptq_webui.core.chat import Message
from gptq_webui.core.errors import BadFile
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.text import chat_template
from gptq_webui.loaders.text.token_codec import TokenCodec
from gptq_webui.loaders.text.tokenizer import read_tokenizer

WORDS = (  # as Qwen's tokenization gives it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "The quick brown fox doesn't jump; 12345 times!\n\n  def f(x):\n\treturn x", " leading and trailing  ", "", " ",
    "日本語 und Käse",
    "e\u0301a\u0301", "👩‍👩‍👧 🇫🇷", "a\n b\r\n\r\n c", "naïve façade ' it's IT'S",
    "aaaaaaaaaaaaaaa", "x  y   z    ", "<s>", "▁ ▁▁",
)  # fmt: skip
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def f(x): return x * 2 # it doesn't matter",
    "Käse und Brot",
    "日本語の文",
] * 30


def merged(piece, ranks):
    """Byte pair encoding from its definition."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[each] for each in parts]
        _rank, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def tiktoken_ids(text, ranks, words, composed=True):
    text = unicodedata.normalize("NFC", text) if composed else text
    return [id for word in regex.findall(words, text) for id in merged(word.encode(), ranks)]


def write_ranks(path, tokens=400, seed=0):
    """A list of tokens, learnt from a little text."""
    ranks = {bytes([at]): at for at in random.Random(seed).sample(range(256), 256)}
    ranks = {token: at for at, token in enumerate(sorted(ranks, key=ranks.get))}
    words = sorted({word.encode() for text in CORPUS for word in regex.findall(WORDS, text)})
    while len(ranks) < tokens:
        count, token_of = {}, list(ranks)
        for word in words:
            parts = [token_of[id] for id in merged(word, ranks)]
            for before, after in itertools.pairwise(parts):
                count[before + after] = count.get(before + after, 0) + 1
        if not count:
            break
        ranks[max(sorted(count), key=count.get)] = len(ranks)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return ranks


def write_settings(folder, name, architecture, model_type="old", **more):
    folder.mkdir(parents=True, exist_ok=True)
    code = f"tokenization_{model_type}.{name}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": name, "auto_map": {"AutoTokenizer": [code, None]}, **more})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture], "auto_map": {}}))
    (folder / f"tokenization_{model_type}.py").write_text("raise SystemExit('it ran')")


def opened(folder):
    return read_tokenizer(LocalModel(folder, "gptq", None, 0, None, ""))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_qwens_list_gives_the_ids_of_its_definition(tmp_path):
    folder = tmp_path / "Qwen-7B-Chat-Int4"
    write_settings(folder, "QWenTokenizer", "QWenLMHeadModel", "qwen", model_max_length=8192)
    ranks = write_ranks(folder / "qwen.tiktoken")
    tokenizer = opened(folder)
    for text in TEXTS:
        wanted = tiktoken_ids(text, ranks, WORDS)
        assert ids_of(tokenizer, text) == wanted, text
        assert tokenizer.decode(wanted) == unicodedata.normalize("NFC", text)
    assert len(tokenizer) == len(ranks) + 3 + 205
    assert ids_of(tokenizer, "a<|im_end|><|extra_204|>") == [ranks[b"a"], len(ranks) + 2, len(ranks) + 207]
    assert tokenizer.eos_token_id == len(ranks) and tokenizer.bos_token_id is None and tokenizer.model_max_length == 8192
    assert TokenCodec(tokenizer).encode("a") == [ranks[b"a"]]


def test_qwens_conversation_is_the_one_of_its_code(tmp_path):
    folder = tmp_path / "Qwen-7B-Chat-Int4"
    write_settings(folder, "QWenTokenizer", "QWenLMHeadModel", "qwen")
    ranks = write_ranks(folder / "qwen.tiktoken", 300)
    tokenizer = opened(folder)
    template = chat_template.find(folder, tokenizer, "QWenLMHeadModel")
    text = template.render([Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "No")], tokenizer)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nNo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "helpful" not in template.render([Message("system", "Be brief."), Message("user", "Hi")], tokenizer)
    assert len(ranks) + 2 in template.stop_ids and template.is_chat


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[:-9] + b"!!!! 1\n", "is no list of tokens"),
        (lambda data: b"<html>", "is no list of tokens"),
        (lambda data: b"".join(data.splitlines(True)[1:]), "a rank of its own"),
        (lambda data: b"".join(data.splitlines(True)[:200]), "no token for the byte"),
        (lambda data: data + base64.b64encode(b"x" * 1001) + b" 300\n", "a token of 1,001 bytes"),
    ],
)
def test_a_damaged_list_says_what_is_wrong(damage, why, tmp_path):
    write_settings(tmp_path, "QWenTokenizer", "QWenLMHeadModel", "qwen")
    write_ranks(tmp_path / "qwen.tiktoken", 300)
    data = (tmp_path / "qwen.tiktoken").read_bytes()
    (tmp_path / "qwen.tiktoken").write_bytes(damage(data))
    with pytest.raises(BadFile, match=why):
        opened(tmp_path)


def write_sentencepiece(folder, *, prefix=True, squeeze=False, kind="bpe", symbols=(), size=420):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 2), model_writer=model, vocab_size=size, model_type=kind, byte_fallback=True,
        add_dummy_prefix=prefix, remove_extra_whitespaces=squeeze, normalization_rule_name="identity", split_digits=True,
        user_defined_symbols=list(symbols), hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(("prefix", "squeeze"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("symbols", [(), ("<eoh>", "<eoa>", "<eoaa>")])
def test_a_model_of_sentencepiece_gives_the_ids_of_sentencepiece(kind, prefix, squeeze, symbols, tmp_path):
    write_settings(tmp_path, "InternLMTokenizer", "InternLMForCausalLM", "internlm")
    own = write_sentencepiece(tmp_path, prefix=prefix, squeeze=squeeze, kind=kind, symbols=symbols)
    tokenizer = opened(tmp_path)
    for text in (*TEXTS, "one<eoh>\ntwo<eoaa> three<eoa>", "<|User|>:quick fox<eoh>\n<|Bot|>:"):
        if "<s>" in text:
            continue  # the library itself takes a special token of a text for letters
        assert ids_of(tokenizer, text) == own.encode(text), text
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text)), text
    assert ids_of(tokenizer, "a</s>") == [*own.encode("a"), own.eos_id()]
    assert tokenizer("a")["input_ids"] == [own.bos_id(), *own.encode("a")]
    assert TokenCodec(tokenizer).encode("quick") == [own.bos_id(), *own.encode("quick")]


def test_the_settings_say_whether_a_text_begins_with_its_token(tmp_path):
    write_settings(tmp_path, "BaichuanTokenizer", "BaichuanForCausalLM", "baichuan", add_bos_token=False)
    own = write_sentencepiece(tmp_path)
    assert TokenCodec(opened(tmp_path)).encode("quick") == own.encode("quick")


def test_baichuans_messages_begin_with_its_reserved_tokens(tmp_path):
    folder = tmp_path / "Baichuan2-7B-Chat-GPTQ"
    write_settings(folder, "BaichuanTokenizer", "BaichuanForCausalLM", "baichuan", add_bos_token=False)
    (folder / "generation_config.json").write_text(json.dumps({"user_token_id": 3, "assistant_token_id": 4}))
    own = write_sentencepiece(folder, symbols=("<reserved_106>", "<reserved_107>"))
    tokenizer = opened(folder)
    template = chat_template.find(folder, tokenizer, "BaichuanForCausalLM")
    chat = [Message("system", "Be brief."), Message("user", "quick fox"), Message("assistant", "dog"), Message("user", "lazy")]
    ids = TokenCodec(tokenizer).encode(template.render(chat, tokenizer))
    wanted = [*own.encode("Be brief."), 3, *own.encode("quick fox"), 4, *own.encode("dog"), 3, *own.encode("lazy"), 4]
    assert ids == wanted and template.stop_ids == (3,)


def test_internlm_begins_and_ends_its_messages_as_it_was_taught(tmp_path):
    folder = tmp_path / "internlm-chat-7b-GPTQ"
    write_settings(folder, "InternLMTokenizer", "InternLMForCausalLM", "internlm")
    own = write_sentencepiece(folder, symbols=("<eoh>", "<eoa>"))
    tokenizer = opened(folder)
    template = chat_template.find(folder, tokenizer, "InternLMForCausalLM")
    chat = [Message("user", "quick fox"), Message("assistant", "dog"), Message("user", "lazy")]
    text = "<|User|>:quick fox<eoh>\n<|Bot|>:dog<eoa>\n<|User|>:lazy<eoh>\n<|Bot|>:"
    assert TokenCodec(tokenizer).encode(template.render(chat, tokenizer)) == [own.bos_id(), *own.encode(text)]
    assert "<eoa>" in "".join(template.stop)
    later = tmp_path / "internlm-chat-20b-GPTQ"
    folder.rename(later)
    text = chat_template.find(later, tokenizer, "InternLMForCausalLM").render(chat, tokenizer)
    assert text == "<s><|User|>:quick fox\n<|Bot|>:dog<eoa>\n<|User|>:lazy\n<|Bot|>:"


def test_the_settings_may_give_a_piece_another_name(tmp_path):
    folder = tmp_path / "internlm2-chat-7b-GPTQ"
    own = write_sentencepiece(folder, symbols=("[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"))
    named = {"3": "<|im_end|>", "4": "<|im_start|>", "1": "<s>", "2": "</s>"}
    decoder = {id: {"content": text, "special": True} for id, text in named.items()}
    write_settings(folder, "InternLM2Tokenizer", "InternLM2ForCausalLM", "internlm2", added_tokens_decoder=decoder)
    tokenizer = opened(folder)
    template = chat_template.find(folder, tokenizer, "InternLM2ForCausalLM")
    ids = TokenCodec(tokenizer).encode(template.render([Message("user", "quick fox")], tokenizer))
    user, answer = own.encode("user\nquick fox"), own.encode("assistant\n")
    assert ids == [1, 4, *user, 3, *own.encode("\n"), 4, *answer]
    assert len(tokenizer) == own.get_piece_size() and tokenizer.decode(ids, skip_special_tokens=True).split() == [
        "user", "quick", "fox", "assistant",
    ]  # fmt: skip


def test_chatglms_special_tokens_follow_its_vocabulary(tmp_path):
    folder = tmp_path / "chatglm3-6b-GPTQ"
    write_settings(folder, "ChatGLMTokenizer", "ChatGLMModel", "chatglm")
    own = write_sentencepiece(folder)
    tokenizer, size = opened(folder), own.get_piece_size()
    template = chat_template.find(folder, tokenizer, "ChatGLMModel")
    ids = TokenCodec(tokenizer).encode(template.render([Message("user", "quick fox")], tokenizer))
    newline = own.encode("\n")
    assert ids == [size + 1, size + 3, size + 6, *newline, *own.encode("quick fox"), size + 7, *newline]
    assert size + 6 in template.stop_ids and tokenizer.eos_token_id == own.eos_id()
    assert TokenCodec(tokenizer).encode("quick fox") == [size + 1, size + 3, *own.encode("quick fox")]  # raw, too
    assert ids_of(tokenizer, "philosophy eop") == own.encode("philosophy eop")
    second = tmp_path / "chatglm2-6b-GPTQ"
    folder.rename(second)
    rounds = chat_template.find(second, tokenizer, "ChatGLMModel")
    chat = [Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "No")]
    ids = TokenCodec(tokenizer).encode(rounds.render(chat, tokenizer))
    assert ids == [size + 1, size + 3, *own.encode("[Round 1]\n\n问：Hi\n\n答：Yes\n\n[Round 2]\n\n问：No\n\n答：")]


def test_glm_4s_list_is_a_file_named_tokenizer_model(tmp_path):
    folder = tmp_path / "glm-4-9b-chat-GPTQ-Int4"
    special = {"<|endoftext|>": 0, "[gMASK]": 2, "<sop>": 4, "<|user|>": 7, "<|assistant|>": 8}
    folder.mkdir()
    ranks = write_ranks(folder / "tokenizer.model", 300)
    decoder = {str(len(ranks) + at): {"content": text, "special": True} for text, at in special.items()}
    write_settings(folder, "ChatGLM4Tokenizer", "ChatGLMModel", "chatglm", added_tokens_decoder=decoder)
    tokenizer = opened(folder)
    words = WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
    for text in TEXTS:
        assert ids_of(tokenizer, text) == tiktoken_ids(text, ranks, words, composed=False), text
    template = chat_template.find(folder, tokenizer, "ChatGLMModel")
    text = template.render([Message("user", "Hi")], tokenizer)
    assert text == "[gMASK]<sop><|user|>\nHi<|assistant|>\n"
    assert ids_of(tokenizer, text)[:3] == [len(ranks) + at for at in (2, 4, 7)]
    assert tokenizer.eos_token_id == len(ranks)


def test_a_tokenizer_json_beside_code_needs_no_code(tmp_path):
    import tiny

    tiny.write_tokenizer(tmp_path, chat_template="{{ messages[0]['content'] }}")
    own = opened(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings |= {"chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"}]}
    write_settings(tmp_path, name="FancyTokenizer", architecture="FancyForCausalLM", bos_token="<s>", eos_token="</s>")
    made = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": settings["chat_template"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(made))
    tokenizer = opened(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert tokenizer.chat_template == {"default": "{{ messages[0]['content'] }}"} and tokenizer.eos_token == "</s>"
