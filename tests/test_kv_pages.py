"""The memory of conversations on a GPU, and what is released where it is full. Runs on any machine."""

import threading
from types import SimpleNamespace

import pytest
import torch

from gptq_webui.core.params import GenerationParams
from gptq_webui.gptq.cuda.cuda_stepper import SMALLEST_CHUNK, CudaStepper, chunk_of
from gptq_webui.gptq.cuda.kernel_arguments import PAGE_TOKENS
from gptq_webui.gptq.cuda.kernel_source import KvFormat
from gptq_webui.gptq.cuda.kv_pages import PagedMemory, Pages
from gptq_webui.gptq.generation import generate
from gptq_webui.gptq.patched_forward import ForwardPatch
from gptq_webui.gptq.prefix_cache import PrefixCache

CPU = torch.device("cpu")


def test_memory_is_allocated_in_small_pieces_whatever_the_model():
    small = Pages(CPU, 2, 2, KvFormat(64))
    small.take()
    assert small.size_bytes <= 1 << 26
    large = Pages(CPU, 40, 40, KvFormat(128))  # a 13B: 52 MB a page
    large.take()
    assert large.size_bytes == large.page_bytes == 40 * 2 * 40 * 128 * 2 * PAGE_TOKENS


def test_an_8_bit_conversation_takes_little_more_than_half():
    plain, bytes_ = Pages(CPU, 32, 8, KvFormat(128)), Pages(CPU, 32, 8, KvFormat(128, q8=True))
    assert 0.5 < bytes_.page_bytes / plain.page_bytes < 0.51


def test_unused_slabs_are_freed_and_the_others_stay():
    pages = Pages(CPU, 40, 40, KvFormat(128))  # a page a slab
    first, second = PagedMemory(pages), PagedMemory(pages)
    first.reserve(3 * PAGE_TOKENS)
    second.reserve(PAGE_TOKENS)
    kept = list(second.pages)
    assert pages.trim() == 0
    del first
    assert pages.trim() == 3 * pages.page_bytes and pages.size_bytes == pages.page_bytes
    second.reserve(2 * PAGE_TOKENS)
    assert second.pages[:1] == kept and pages.size_bytes == 2 * pages.page_bytes
    pages.copy(second.pages[0], second.pages[1])  # the addresses are still known


class Step:
    """A step whose GPU holds so many tokens of conversations, and prompts of so many tokens at a time."""

    def __init__(self, room: int, at_once: int) -> None:
        self.room, self.at_once = room, at_once
        self.pages = Pages(CPU, 1, 1, KvFormat(32))
        self.prompt_logits = torch.zeros(1, 8)
        self.sequences = SimpleNamespace(prompt_row=1, use=lambda memory, tokens, row: memory.reserve(tokens))
        self.read: list[int] = []
        take = self.pages.take

        def limited() -> int:
            if not self.pages._free and self.pages.size_bytes >= self.room * self.pages.page_bytes // PAGE_TOKENS:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return take()

        self.pages._slab_pages = 1
        self.pages.take = limited

    def mark(self, timed=False):
        return SimpleNamespace(query=lambda: False)

    def prefill(self, ids, start, row, adapter=None, ends=False):
        if len(ids) > self.at_once:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.read.append(len(ids))
        return torch.zeros(len(ids), 4)


def stepper_of(step):
    stepper = object.__new__(CudaStepper)
    stepper._step, stepper.parallel, stepper.device = step, 1, CPU
    stepper._share(step, 1)
    stepper.page_room.prefix = PrefixCache()
    return stepper


def test_a_prompt_that_does_not_fit_is_read_in_smaller_pieces_from_then_on():
    stepper = stepper_of(step := Step(room=4096, at_once=600))
    memory = stepper.begin()
    stepper.prefill(memory, range(2000))
    assert memory.length == 2000 and step.read == [512, 512, 512, 464]
    assert stepper.chunk_tokens == 512 and CudaStepper.chunk_tokens == 2048


def test_earlier_conversations_are_released_before_that():
    stepper = stepper_of(Step(room=1024, at_once=4096))
    earlier = stepper.begin()
    stepper.prefill(earlier, range(700))
    stepper.page_room.prefix.keep(list(range(700)), earlier)
    del earlier
    memory = stepper.begin()
    stepper.prefill(memory, range(1000))
    assert memory.length == 1000 and stepper.page_room.prefix.conversations == 0 and stepper.chunk_tokens == 2048


def test_a_prompt_of_transformers_generate_is_read_in_smaller_pieces_too():
    stepper = stepper_of(step := Step(room=4096, at_once=600))
    patch = ForwardPatch(SimpleNamespace(forward=lambda input_ids=None: None), stepper, stepper.page_room.prefix)
    assert patch._logits([], list(range(1000)), 1).shape == (1, 1, 8) and step.read == [512, 488]


def test_where_nothing_is_left_to_release_the_error_is_raised_and_nothing_is_lost():
    stepper = stepper_of(Step(room=4096, at_once=SMALLEST_CHUNK // 2))
    memory = stepper.begin()
    with pytest.raises(torch.OutOfMemoryError):
        stepper.prefill(memory, range(1000))
    assert memory.length == 0 and stepper.chunk_tokens == SMALLEST_CHUNK
    prefix = PrefixCache()
    with pytest.raises(torch.OutOfMemoryError):
        list(
            generate(
                stepper, list(range(1000)), GenerationParams(), threading.Event(), prefix=prefix, end_ids=(), context_tokens=4096
            )
        )


@pytest.mark.parametrize(("free_gb", "token_kb", "tokens"), [
    (100, 130, 4096),  # a 7B on a large GPU
    (6, 130, 2048),  # on a small one
    (100, 300, 2048),  # a 70B: its activations would not fit into what is kept free
])  # fmt: skip
def test_prompts_are_read_in_large_pieces_where_their_activations_fit(free_gb, token_kb, tokens):
    assert chunk_of(free_gb * 10**9, token_kb * 10**3) == tokens


def test_large_pieces_are_for_a_prompt_that_is_read_alone():
    stepper = stepper_of(Step(room=4096, at_once=4096))
    stepper.chunk_tokens = 4096
    first, second = stepper.turns.join(), stepper.turns.join()
    assert (first.tokens(), stepper.piece_limit()) == (2048, 2048)
    second.close()
    assert stepper.piece_limit() == first.tokens() == 4096
    stepper.chunk_tokens = 512  # as where the GPU is nearly full
    assert stepper.piece_limit() == 512
