"""engine/conversation.py: a chat becomes prompt ids once, and what outgrows the context goes in blocks."""

import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from gptq_webui.core.chat import Finish, Message, Step
from gptq_webui.core.errors import PromptTooLong
from gptq_webui.core.models import LocalModel
from gptq_webui.core.params import GenerationParams
from gptq_webui.engine.conversation import Conversation
from gptq_webui.loaders.contract.base import LoadedModel
from gptq_webui.loaders.text.built_in_templates import BUILT_IN
from gptq_webui.loaders.text.chat_template import ChatTemplate

TEXT = "the sea is wide and its colour changes with the weather while ships pass slowly from one harbour to another"
WORDS = TEXT.split()
SYSTEM = Message("system", "You answer in short sentences. " * 8)


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE as SmolLM2's, small."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(random.Random(at).choices(WORDS, k=30)) for at in range(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")


class Counting(LoadedModel):
    """Answers with words, and counts what is done to a prompt."""

    can = frozenset({"max_new_tokens"})

    def __init__(self, tokenizer, context_tokens=1024, template="ChatML", answer_tokens=40):
        model = LocalModel(Path("/nowhere/counting"), "gptq", None, 10, context_tokens, "LlamaForCausalLM")
        template = ChatTemplate(BUILT_IN[template], template, "the test")
        super().__init__(model, tokenizer, template, context_tokens=context_tokens)
        self.answer_tokens, self.last, self.reused, self.renders = answer_tokens, [], [], 0

    def prompt(self, source):
        self.renders += not isinstance(source, str)
        return super().prompt(source)

    def _steps(self, ids, params, cancel):
        same = next((at for at, (a, b) in enumerate(zip(self.last, ids, strict=False)) if a != b), min(len(self.last), len(ids)))
        self.reused.append(same / len(ids))
        rng = random.Random(len(ids))
        new = [rng.randrange(300, 500) for _ in range(min(self.answer_tokens, params.max_new_tokens))]
        yield from (Step(each) for each in new)
        self.last = [*ids, *new]
        yield Finish("stop", prompt_tokens=len(ids))


@pytest.fixture
def loaded(tokenizer):
    loaded = Counting(tokenizer)
    yield loaded
    loaded.close()


def chat(turns, words=30, seed=0):
    rng = random.Random(seed)
    messages = [SYSTEM]
    for at in range(turns):
        messages += [
            Message("user", f"Question {at}: " + " ".join(rng.choices(WORDS, k=words))),
            Message("assistant", f"Answer {at}: " + " ".join(rng.choices(WORDS, k=words))),
        ]
    return [*messages, Message("user", "The last question?")]


@pytest.fixture
def calls(monkeypatch, tokenizer):
    """How often the tokenizer read a text."""
    calls, read = [], type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, *args, **kwargs: calls.append(args) or read(self, *args, **kwargs)
    )
    return calls


def test_a_short_message_is_rendered_and_tokenised_once(loaded, calls):
    window = Conversation().window(loaded, [Message("user", "Hello")], 100)
    list(loaded.answer(window.prompt, GenerationParams(), threading.Event()))
    assert (loaded.renders, len(calls)) == (1, 1)


def test_only_what_is_new_is_tokenised(loaded, calls):
    conversation, messages = Conversation(), chat(5)
    conversation.window(loaded, messages, 100)
    calls.clear()
    conversation.window(loaded, [*messages, Message("assistant", "new answer"), Message("user", "new question")], 100)
    ((texts,),) = calls
    assert [each.split("\n")[1].removesuffix("<|im_end|>") for each in texts] == ["new answer", "new question"]


def test_a_chat_that_fits_is_left_alone(loaded):
    messages = chat(3)
    window = Conversation().window(loaded, messages, 512)
    assert window.dropped_turns == 0 and window.prompt == loaded.prompt(messages)


@pytest.mark.parametrize("template", ["ChatML", "Llama-2 [INST]", "Alpaca"])
@pytest.mark.parametrize("turns", [12, 30, 400])
def test_a_full_chat_drops_whole_oldest_turns_and_says_how_many(tokenizer, template, turns):
    loaded = Counting(tokenizer, 1000, template)
    messages = chat(turns)
    window = Conversation().window(loaded, messages, 100)
    kept = list(window.prompt.messages)
    assert kept[0] == SYSTEM and kept[-1] == messages[-1] and kept[1].role == "user"
    assert kept[1:] == messages[1 + window.dropped_turns :]
    assert window.dropped_turns > 0 and window.dropped_turns % 2 == 0
    assert 0.5 * 900 < len(window.prompt.ids) <= 900
    assert loaded.renders <= 3
    loaded.close()


def test_the_window_stays_until_the_chat_outgrows_it_again(loaded, calls):
    conversation, messages, beginnings = Conversation(), chat(0), []
    params = GenerationParams(max_new_tokens=60)
    for at in range(200):
        window = conversation.window(loaded, messages, params.max_new_tokens)
        assert len(window.prompt.ids) + 60 <= loaded.context_tokens
        text = "".join(
            each.text for each in loaded.answer(window.prompt, params, threading.Event()) if not isinstance(each, Finish)
        )
        beginnings.append(window.dropped_turns)
        messages += [Message("assistant", text), Message("user", f"And then, number {at}?")]
    moves = [at for at, (before, after) in enumerate(pairwise(beginnings), 1) if before != after]
    assert len(moves) > 10 and all(b - a >= 4 for a, b in pairwise(moves)), moves
    for at in range(1, 200):
        if at not in moves:
            assert loaded.reused[at] > 0.5, (at, loaded.reused[at])
    assert loaded.renders <= 200 + len(moves) and len(calls) <= 200 + len(moves)


def test_an_edit_behind_the_beginning_keeps_the_window_and_one_before_it_does_not(loaded):
    conversation, messages = Conversation(), chat(30)
    first = conversation.window(loaded, messages, 100)
    edited = [*messages[:-2], Message("assistant", "Something else."), messages[-1]]
    assert conversation.window(loaded, edited, 100).dropped_turns == first.dropped_turns
    loaded.renders = 0
    conversation.window(loaded, [messages[0], Message("user", "Another chat"), *messages[2:]], 100)
    assert loaded.renders == 2


def test_when_later_turns_are_deleted_the_whole_chat_comes_back(loaded):
    conversation, messages = Conversation(), chat(30)
    dropped = conversation.window(loaded, messages, 100).dropped_turns
    left = [*messages[: dropped + 3], Message("user", "short")]
    assert loaded.context_tokens < len(loaded.prompt(left).ids)  # still too long: the window stays
    assert conversation.window(loaded, left, 100).dropped_turns == dropped
    short = [*messages[:7], Message("user", "short")]
    assert conversation.window(loaded, short, 100).dropped_turns == 0


def test_another_model_begins_anew(loaded, tokenizer):
    conversation, messages = Conversation(), chat(30)
    assert conversation.window(loaded, messages, 100).dropped_turns
    longer = Counting(tokenizer, 8192)
    assert conversation.window(longer, messages, 100).dropped_turns == 0
    longer.close()


def test_the_last_turn_is_kept_with_less_room_for_the_answer(loaded):
    long = Message("user", " ".join(["sea"] * 720))
    length = len(loaded.prompt([SYSTEM, long]).ids)
    assert loaded.context_tokens - 200 < length < loaded.context_tokens
    window = Conversation().window(loaded, [*chat(3)[:-1], long], 200)
    assert window.dropped_turns == 6 and len(window.prompt.ids) == length


def test_a_message_longer_than_the_context_is_a_sentence(loaded):
    with pytest.raises(PromptTooLong, match="Shorten it"):
        Conversation().window(loaded, [Message("user", "sea " * 3000)], 100)
    with pytest.raises(PromptTooLong, match="no room to continue"):
        Conversation().window(loaded, [Message("user", "go"), Message("assistant", "sea " * 3000)], 100)


def test_a_message_in_a_long_chat_costs_little_processor_time(tokenizer):
    """120 turns at 8,192 tokens: it was 86 renders and 6 s for each message."""
    loaded, conversation, messages = Counting(tokenizer, 8192), Conversation(), chat(120, words=30)
    assert len(loaded.prompt(messages).ids) > 8192
    spent = []
    for at in range(20):
        began = time.process_time()
        window = conversation.window(loaded, messages, 512)
        spent.append(time.process_time() - began)
        assert window.dropped_turns
        messages += [Message("assistant", "Yes. " * 30), Message("user", f"And {at}?")]
    assert sorted(spent)[len(spent) // 2] < 0.05, spent
    loaded.close()
