"""loaders/text/tokenizer.py and tokenizer_trial.py: the files of a tokenizer, whoever wrote them, are read or a sentence."""

import io
import json
import time

import pytest
import transformers

import tiny
from gptq_webui.core.errors import BadParameter, GptqWebuiError
from gptq_webui.core.models import LocalModel
from gptq_webui.loaders.text import tokenizer_trial
from gptq_webui.loaders.text.token_codec import TokenCodec
from gptq_webui.loaders.text.tokenizer import read_tokenizer

REDOS = r"(a+)+$|(x+x+)+y|(\w+\s?)+!"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 493443\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return folder


def read(folder):
    return read_tokenizer(LocalModel(folder, "gptq", None, 10, 100, "LlamaForCausalLM"))


def edit(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def split_by(folder, pattern):
    edit(
        folder / "tokenizer.json",
        lambda values: values.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        ),
    )


# Files of strangers


def test_a_tokenizer_is_tried_once(folder, monkeypatch):
    assert read(folder).encode("hello")
    monkeypatch.setattr(tokenizer_trial, "Child", None)  # not started again
    assert read(folder).encode("hello")
    edit(folder / "tokenizer.json", lambda values: values.update(truncation=None, version="1.0", more=1))
    with pytest.raises(TypeError):
        read(folder)


def test_a_pattern_that_explodes_is_a_sentence(folder):
    split_by(folder, REDOS)
    for _ in range(2):  # the second time from the verdict that was kept
        began = time.perf_counter()
        with pytest.raises(GptqWebuiError, match=r"damaged, or made to do harm: .*retry-limit.*another author") as caught:
            read(folder)
        assert "Panic" not in str(caught.value)
    assert time.perf_counter() - began < 0.5


def test_a_file_that_takes_all_memory_or_time_is_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "_MEMORY_BYTES", 150 << 20)
    edit(
        folder / "tokenizer.json",
        lambda values: values["model"]["vocab"].update({f"token number {at}": 1000 + at for at in range(900_000)}),
    )
    with pytest.raises(GptqWebuiError, match="made to do harm"):
        read(folder)
    monkeypatch.setattr(tokenizer_trial, "_READ_S", 0.01)
    edit(folder / "tokenizer.json", lambda values: values.update(other=2))
    with pytest.raises(GptqWebuiError, match="it took too long"):
        read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": ' * 100_000, "\x00" * 100, '{"version": "1.0"}'])
def test_a_damaged_file_is_a_sentence(text, folder):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(GptqWebuiError, match=r"tokenizer\.json .*ownload the model again"):
        read(folder)


def test_a_panic_in_this_process_is_a_sentence(folder):
    from tokenizers import Regex, pre_tokenizers

    tokenizer = read(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(REDOS), "isolated")
    codec = TokenCodec(tokenizer)
    with pytest.raises(BadParameter, match=r"cannot read this text: .*retry-limit"):
        codec.encode("word " * 30)
    assert codec.encode("hi") and not codec.lock.locked()


# Files that libraries do not read


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_byte_order_mark_is_left_off(name, folder):
    expected = read(folder).encode("hello world")
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert read(folder).encode("hello world") == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # the user's folder is not written to


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_special_tokens_may_be_objects(name, folder):
    objects = [
        {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} for text in ("<s>", "</s>")
    ]
    path = folder / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, "additional_special_tokens": objects}))
    assert read(folder).encode("hello")


def test_a_list_of_extra_tokens_is_read_by_either_transformers(folder):
    edit(folder / "tokenizer_config.json", lambda values: values.update(extra_special_tokens=["<s>", "</s>"]))
    tokenizer = read(folder)
    text = tokenizer.decode(tokenizer.convert_tokens_to_ids(["<s>", "</s>"]), skip_special_tokens=True)
    assert text == ""


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_a_git_lfs_pointer_is_named_as_one(name, folder):
    (folder / name).write_text(LFS)
    with pytest.raises(GptqWebuiError, match=rf"{name} is a Git LFS pointer"):
        read(folder)


def test_a_folder_without_a_tokenizer_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(GptqWebuiError, match="cannot be read"):
        read(tmp_path)


# sentencepiece


def test_a_verdict_on_one_kind_of_file_is_none_on_another(folder, tmp_path):
    split_by(folder, REDOS)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes((folder / "tokenizer.json").read_bytes())
    assert tokenizer_trial.problem(other / "tokenizer.model") == ""  # no sentencepiece model: whoever reads it says so
    with pytest.raises(GptqWebuiError, match="made to do harm"):
        read(folder)


@pytest.mark.parametrize("settings", [
    {"tokenizer_file": "evil.json"}, {"fast_tokenizer_files": ["evil.4.0.0.json"]}, {"init_inputs": ["evil.json"]},
    {"vocab_file": "/dev/zero", "merges_file": "/dev/zero"}, {"special_tokens_map_file": "/dev/zero", "from_slow": True},
    {"tokenizer_object": {"a": 1}, "__slow_tokenizer": 5},
], ids=lambda each: next(iter(each)))  # fmt: skip
def test_no_other_file_is_read_than_those_that_were_tried(folder, settings):
    good = read(folder).encode("hello")
    split_by(folder, REDOS)
    for name in ("evil.json", "evil.4.0.0.json"):
        (folder / name).write_bytes((folder / "tokenizer.json").read_bytes())
    tiny.write_tokenizer(folder)
    text = json.dumps(settings).replace('"evil', f'"{folder}/evil')
    edit(folder / "tokenizer_config.json", lambda values: values.update(json.loads(text)))
    assert read(folder).encode("hello") == good


@pytest.fixture
def pieces(tmp_path):
    """A folder with a small tokenizer.model and no tokenizer.json; (folder, its protocol buffer)."""
    trainer = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2 as messages

    folder, model = tmp_path / "pieces", io.BytesIO()
    folder.mkdir()
    words = ["the capital of france is paris and other words that are long enough", "a b c d e f g h i j k l m n o p q r s t u v"]
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    found = messages.ModelProto()
    found.ParseFromString(model.getvalue())
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(found.SerializeToString())
    return folder, found


def test_a_sentencepiece_model_is_tried_once(pieces, monkeypatch):
    folder, _model = pieces
    assert read(folder).encode("the capital")
    monkeypatch.setattr(tokenizer_trial, "Child", None)  # not started again
    assert read(folder).encode("the capital")


def test_a_sentencepiece_model_with_a_token_of_megabytes_is_a_sentence(pieces):
    folder, model = pieces
    model.pieces.add(piece="x" * 3_000_000, score=-100.0)  # transformers would take each of its parts: 4.5 TB
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    began = time.perf_counter()
    with pytest.raises(GptqWebuiError, match=r"tokenizer\.model of .* made to do harm: one of its tokens has 3000000 characters"):
        read(folder)
    assert time.perf_counter() - began < 20


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has sentencepiece read the file, which takes no time")
def test_a_sentencepiece_model_that_takes_all_time_is_a_sentence(pieces, monkeypatch):
    folder, model = pieces
    for at in range(500_000):
        model.pieces.add(piece=f"token {at}", score=-1.0)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    monkeypatch.setattr(tokenizer_trial, "_READ_S", 0.001)  # a small file might be read before anybody looks at the clock
    with pytest.raises(GptqWebuiError, match=r"tokenizer\.model .*it took too long"):
        read(folder)
    monkeypatch.undo()
    with pytest.raises(GptqWebuiError, match=r"tokenizer\.model .* made to do harm: it has 5000\d\d tokens"):
        read(folder)


@pytest.mark.parametrize("data", [b"\x0a\xff\xff\xff\xff\x0f", b"\x00" * 1000], ids=["cut", "zeros"])
def test_what_is_no_sentencepiece_model_is_a_sentence(pieces, data):
    folder, _model = pieces
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(GptqWebuiError, match=r"ownload the model again") as caught:
        read(folder)
    assert "Error" not in str(caught.value) and "<class" not in str(caught.value)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "T5Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(("files", "says"), [
    ({}, "the folder has no tokenizer.json, tokenizer.model or vocab.json"),
    ({"tokenizer.model": b""}, "it is empty"),
    ({"spiece.model": b"\n"}, "it is empty"),
    ({"tokenizer.model": b"<!DOCTYPE html><p>Not found"}, "tokenizer.model is a web page"),
    ({"tokenizer.model": bytes(range(256)) * 9}, "vocabulary"),
    ({"vocab.json": b"", "merges.txt": b""}, "vocab.json is empty"),
    ({"vocab.json": b"[1", "merges.txt": b"a b"}, "vocab.json is not JSON"),
], ids=lambda each: str(each)[:40])  # fmt: skip
def test_a_vocabulary_that_is_missing_or_damaged_is_named(tmp_path, kind, files, says):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(GptqWebuiError) as caught:
        read(folder)
    said = str(caught.value)
    assert "Download the model again" in said and "Error" not in said and "tiktoken" not in said, said
    assert says in said or "vocabulary" in said or "not UTF-8" in said, said


@pytest.mark.parametrize("pattern", [r"(q+q+)+!", r"z*z*z*z*!", r"(?:zk|z?k?)+!", r"(~~?)*#"])
def test_a_pattern_is_tried_on_its_own_letters(pattern, folder):
    """It takes for ever on a text of theirs alone, which no text of every day has."""
    split_by(folder, pattern)
    with pytest.raises(GptqWebuiError, match="damaged, or made to do harm"):
        read(folder)
