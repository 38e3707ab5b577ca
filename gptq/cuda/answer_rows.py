"""An answer as it runs on a GPU beside others, and the tokens that were sampled together."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.chat import Step
from ...core.errors import BadParameter
from ...core.params import GenerationParams
from ..grammar_mask import GrammarMask
from ..guessing import Guesser
from ..sampling import Sampler, log_probabilities
from ..token_rules import TokenRules
from .kernel_arguments import HOST_TOKENS
from .row_probabilities import RowProbabilities
from .sample import packed_params
from .sequences import IDLE, Sequences

_GREEDY = GenerationParams(temperature=0, repetition_penalty=1, top_k=0, top_p=1)  # of a row that PyTorch samples


def prepare_row(
    sequences: Sequences,
    row: int,
    ids: Sequence[int],
    params: GenerationParams,
    *,
    seed: int = 0,
    banned: Collection[int] = (),
    masked: bool = False,
    prompt: int | None = None,
) -> None:
    """Give the GPU an answer's parameters and the `ids` before it, `prompt` of which are no answer (None: all).

    Raises BadParameter for a bias on no token.
    """
    vocabulary = sequences.shape.vocabulary
    if params.logit_bias and params.logit_bias[-1][0] >= vocabulary:
        raise BadParameter(f"logit_bias names token {params.logit_bias[-1][0]}; the model's tokens are 0 to {vocabulary - 1}.")
    biases = dict(params.logit_bias) | {id: -math.inf for id in banned if 0 <= id < vocabulary}
    sequences.set_params(row, packed_params(params, seed, bool(biases), masked))
    if biases:
        sequences.set_bias(row, biases)
    sequences.set_history(row, ids, params.repetition_range, prompt)


class Answer:
    """A running one (`row`), or one that waits for a row or for pages. Its tokens before the sampled ones are in its memory."""

    def __init__(
        self,
        number: int,
        give_up: Callable[["Answer"], None],
        memory: Any,
        ids: Sequence[int],
        logits: Tensor,
        params: GenerationParams,
        rules: TokenRules,
        mask: GrammarMask | None,
    ) -> None:
        """`number`: in the order of arrival. `give_up` takes its row and its pages away."""
        self.memory, self.params, self.rules, self.number, self.mask = memory, params, rules, number, mask
        self.logits: Tensor | None = logits  # of its last id, while it waits for a row; None: its ids must be read again
        self._give_up = give_up
        self.seed = params.seed if params.seed is not None else int(torch.randint(0, 2**62, ()))
        self.ids = list(ids)  # its prompt, and what the host has read of the answer
        self.prompt = len(self.ids)
        self.row = IDLE
        self.room = 0  # tokens that its pages in the row's table are ready for
        self.next = self.prompt  # position of the next token to be sampled
        self.joined: Sampled | None = None  # its first token, until the host has read it
        self.sampled: deque[Step] = deque()  # that its consumer has not taken yet
        self.sampler: Sampler | None = None  # for what the kernel cannot do
        self.guesser: Guesser | None = None  # of its next tokens, once it has run alone
        self.guessed_from = self.prompt  # ids that the guesser has, or will have
        self.error: Exception | None = None
        self.ended = False  # its memory holds the whole context, or nothing may follow
        self.left = False  # its consumer has gone

    def give_up(self) -> None:
        """Its pages; it reads its tokens again later. Its seed and its position say what is sampled then."""
        self._give_up(self)

    @property
    def needs_host(self) -> bool:
        """Whether its next token cannot be sampled before the host has read the last one."""
        return self.mask is not None or self.sampler is not None

    @property
    def wants_more(self) -> bool:
        """Whether it may have tokens after those that are sampled or will be."""
        return self.next - self.prompt < self.params.max_new_tokens

    @property
    def masked(self) -> bool:
        """Whether the kernel samples it by a mask."""
        return self.mask is not None and self.sampler is None

    def write_mask(self, sequences: Sequences) -> None:
        """What may come next, where the next copy takes it."""
        assert self.mask is not None
        host = sequences.host_masks[self.row].numpy().view(np.uint8)
        bits = np.frombuffer(self.mask.bits(sequences.shape.vocabulary), np.uint8)
        host[: len(bits)] = bits
        host[len(bits) :] = 0

    def choose(self, sequences: Sequences) -> tuple[int, Any]:
        """Sample with PyTorch from its row's logits -> the token, and what a Step says of its probabilities."""
        assert self.sampler is not None
        logits = sequences.logits[self.row : self.row + 1].clone()
        allowed = self.mask.allowed(logits.shape[1]).to(logits.device) if self.mask is not None else None
        token = self.sampler(logits, torch.tensor([self.ids], device=logits.device), allowed)
        sequences.ids[self.row : self.row + 1].copy_(token.view(1))
        id, wanted = int(token), self.params.logprobs
        return id, () if wanted is None else log_probabilities(logits, id, wanted)

    def prepare(self, sequences: Sequences) -> None:
        """Give the GPU its parameters and what precedes it. Raises BadParameter for a bias on no token."""
        params = self.params if self.sampler is None else _GREEDY
        banned = self.rules.banned if self.sampler is None else ()
        prepare_row(sequences, self.row, self.ids, params, seed=self.seed, banned=banned, masked=self.masked, prompt=self.prompt)


class Sampled:
    """Tokens that the GPU has sampled or will have, until the host reads them."""

    def __init__(
        self,
        mark: Any,
        answers: Sequence[Answer],
        found: RowProbabilities | None,
        is_step: bool,
        guesses: int = 0,  # tokens that may follow the first, of the only answer
    ) -> None:
        self.guesses = guesses
        self.mark, self.answers, self.found, self.is_step = mark, answers, found, is_step
        self.rows = [each.row for each in answers]
        self.columns = [each.next % HOST_TOKENS for each in answers]
