"""loaders/text/answer_ids.py: an answer keeps the ids that were sampled, as long as its text is unedited."""

import threading
from pathlib import Path

import pytest

from gptq_webui.core.chat import Finish, Message, Step, Token
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.loaders.contract.base import LoadedModel
from gptq_webui.loaders.text.answer_ids import EarlierAnswers
from gptq_webui.loaders.text.built_in_templates import CHATML
from gptq_webui.loaders.text.chat_template import ChatTemplate

A, B, AB = 6, 7, 8
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def tokenizer():
    """Letters and marks; a and b, one after the other, are one token in a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: at for at, text in enumerate([*SPECIAL, "Ġ", "Ċ", "a", "b", "ab"])}
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


class Says(LoadedModel):
    """Answers with its own ids to every prompt."""

    can = frozenset({"max_new_tokens", "stop"})

    def __init__(self, tokenizer, ids):
        model = LocalModel(Path("/nowhere/says"), "gptq", None, 10, 500, "LlamaForCausalLM")
        template = ChatTemplate(CHATML, "ChatML", "the test", ("<|im_end|>",))
        super().__init__(model, tokenizer, template, context_tokens=500)
        self.ids, self.asked = ids, []

    def _steps(self, ids, params, cancel):
        self.asked.append(list(ids))
        for id in self.ids:
            if cancel.is_set():
                break
            yield Step(id)
        yield Finish("stop", prompt_tokens=len(ids))


@pytest.fixture
def says(tokenizer):
    model = Says(tokenizer, [A, B, A, B])  # the text "abab", which a tokenizer would write AB, AB
    yield model
    model.close()


def ask(model, messages, **params):
    events = list(model.chat(messages, GenerationParams(**params), threading.Event()))
    return "".join(event.text for event in events if isinstance(event, Token))


def test_an_unedited_answer_keeps_its_ids(says):
    first = [Message("user", "a")]
    text = ask(says, first)
    assert text == "abab"
    ask(says, [*first, Message("assistant", text), Message("user", "ab")])
    before, after = says.asked
    assert after[: len(before) + 4] == [*before, A, B, A, B]
    assert after[len(before) + 4] == SPECIAL.index("<|im_end|>") and AB in after[len(before) + 5 :]


def test_an_edited_answer_is_read_from_its_text(says):
    first = [Message("user", "a")]
    ask(says, first)
    edited = [*first, Message("assistant", "abba"), Message("user", "b")]
    ask(says, edited)
    assert says.asked[1] == says.encode(says.template.render(edited, says.tokenizer))
    assert AB in says.asked[1]


def test_a_third_turn_keeps_both_answers(says):
    messages = [Message("user", "a")]
    for _ in range(3):
        messages += [Message("assistant", ask(says, messages)), Message("user", "b")]
    for before, after in zip(says.asked, says.asked[1:], strict=False):
        assert after[: len(before) + 4] == [*before, A, B, A, B]


def test_an_answer_that_is_continued_keeps_its_ids(says):
    first = [Message("user", "a")]
    text = ask(says, first)
    ask(says, [*first, Message("assistant", text)])
    assert says.asked[1] == [*says.asked[0], A, B, A, B]


def test_white_space_that_a_template_cuts_off_is_no_edit(says, tokenizer):
    says.ids = [4, A, B, 4]  # " ab "
    first = [Message("user", "a")]
    text = ask(says, first)
    ask(says, [*first, Message("assistant", text.strip()), Message("user", "b")])
    assert says.asked[1][: len(says.asked[0]) + 4] == [*says.asked[0], 4, A, B, 4]


def test_what_a_stop_string_swallowed_is_not_earlier(says):
    first = [Message("user", "a")]
    says.ids = [A, B, A, A, B, B]
    text = ask(says, first, stop=("bb",))
    assert text == "abaa"
    ask(says, [*first, Message("assistant", text), Message("user", "b")])
    assert says.asked[1][: len(says.asked[0]) + 5] == [*says.asked[0], A, B, A, A, SPECIAL.index("<|im_end|>")]


def test_a_prompt_begins_with_an_earlier_prompt_and_its_answer():
    earlier = EarlierAnswers()
    earlier.remember("p", [1], [2, 3], "xy", lambda ids: "xy")
    assert earlier.beginnings("pxyz") == [([1, 2, 3], 3)] and earlier.beginnings("qxyz") == []


def test_a_token_that_reaches_over_the_end_of_an_answer_is_not_cut(says):
    says.template = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}", "no marks", "the test")
    first = [Message("user", "b")]
    says.ids = [B, A]
    text = ask(says, first)
    ask(says, [*first, Message("assistant", text), Message("user", "b")])
    assert says.asked[1] == [B, B, AB]
    ask(says, [*first, Message("assistant", text), Message("user", "a")])
    assert says.asked[2] == [B, B, A, A]
