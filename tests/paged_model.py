"""A model in the place of the GPU's step, on any machine: it keeps tokens in pages where a model keeps keys and values.

What it answers depends on every token that it finds in the pages of a row, so an answer shows whether they are right.
"""

import random

import numpy as np
import torch

from gptq_webui.gptq.cuda.batch_step import rows_of_graph
from gptq_webui.gptq.cuda.cuda_stepper import CudaStepper
from gptq_webui.gptq.cuda.kernel_arguments import HOST_TOKENS, PAGE_TOKENS, SAMPLE_PARAMS
from gptq_webui.gptq.cuda.kernel_source import KvFormat
from gptq_webui.gptq.cuda.kv_pages import Pages
from gptq_webui.gptq.cuda.model_shape import ModelShape
from gptq_webui.gptq.cuda.sequences import Sequences

CPU = torch.device("cpu")
VOCABULARY = 70


class Mark:
    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


class PagedModel:
    """In the place of CudaStep."""

    device = CPU
    rows_of = staticmethod(rows_of_graph)

    def __init__(self, context_tokens, pages=None, rows=2):
        shape = ModelShape.__new__(ModelShape)
        vars(shape).update(vocabulary=VOCABULARY, context_tokens=context_tokens, embedding_rows=VOCABULARY)
        self.shape = shape
        self.pages = Pages(CPU, 1, 1, KvFormat(32))
        self.pages._slab_pages = 1
        self.pages.limit_bytes = None if pages is None else pages * self.pages.page_bytes
        self.pages.copy = self._copy
        self.sequences = Sequences(CPU, shape, rows)
        self.prompt_logits = torch.zeros(1, VOCABULARY)
        self.tokens = {}  # (address of a page, place in it) -> token
        self.read_tokens, self.rows_computed, self.together = 0, [], 0

    def _copy(self, source, target):
        for at in range(PAGE_TOKENS):
            if (source, at) in self.tokens:
                self.tokens[target, at] = self.tokens[source, at]

    def _logits(self, row, position):
        pages = self.sequences.table[row].tolist()
        seen = [self.tokens[pages[at // PAGE_TOKENS], at % PAGE_TOKENS] for at in range(position + 1)]
        return torch.tensor(np.random.RandomState(hash(tuple(seen)) % 2**32).randn(VOCABULARY), dtype=torch.float32)

    def prefill(self, ids, start, row=0, adapter=None, ends=False):
        pages = self.sequences.table[row].tolist()
        for at, id in enumerate(ids, start):
            self.tokens[pages[at // PAGE_TOKENS], at % PAGE_TOKENS] = id
        self.read_tokens += len(ids)
        hidden = torch.stack([self._logits(row, at) for at in range(start, start + len(ids))])
        self.prompt_logits[0] = hidden[-1]
        return hidden

    def all_logits(self, hidden):
        return hidden

    normed = all_logits

    def prefill_several(self, pieces, wanted):
        found = []
        self.together = max(self.together, len(pieces))
        for memory, ids in pieces:
            self.sequences.show([(memory, self.sequences.prompt_row)])
            self.prefill(ids, memory.length, self.sequences.prompt_row)
            found.append(self.prompt_logits.clone())
        return [each if wants else None for each, wants in zip(found, wanted, strict=True)]

    def step_rows(self, rows, sample_next=True, adapters=None):
        rows = min(rows_of_graph(rows), self.sequences.rows)
        self.rows_computed.append(rows)
        for row in range(rows):
            if (position := int(self.sequences.positions[row])) < 0:
                continue
            page = int(self.sequences.table[row, position // PAGE_TOKENS])
            self.tokens[page, position % PAGE_TOKENS] = int(self.sequences.ids[row])
            self.sequences.logits[row] = self._logits(row, position)
        if sample_next:
            self.sample(0, rows)

    def sample(self, first, rows):
        s = self.sequences
        for row in range(first, first + rows):
            if (position := int(s.positions[row])) < 0:
                continue
            params = s.params[row].view(torch.int32)
            seed, masked, biased = (int(params[SAMPLE_PARAMS.offset(name) // 4]) for name in ("seed_low", "masked", "biased"))
            z = s.logits[row] + (s.bias[row] if biased else 0)
            if float(s.params[row].view(torch.float32)[SAMPLE_PARAMS.offset("temperature") // 4]):
                z = z + torch.tensor(np.random.RandomState((seed * 7919 + position) % 2**32).gumbel(size=VOCABULARY))
            if masked:
                bits = np.unpackbits(s.masks[row].numpy().view(np.uint8), bitorder="little")[:VOCABULARY]
                z = z.masked_fill(torch.from_numpy(bits) == 0, -torch.inf)
            z = z - 0.01 * s.answered[row]  # shows whether the counts are those of the answer
            chosen = int(z.argmax())
            s.ids[row], s.positions[row] = chosen, position + 1
            s.answered[row, chosen] += 1
            s.host_tokens[row, (position + 1) % HOST_TOKENS] = chosen

    def grow(self, rows):
        self.sequences.grow(rows)

    def mark(self, timed=False):
        return Mark()


def paged_stepper(model, limit=256, guesses=False):
    stepper = object.__new__(CudaStepper)
    stepper._step, stepper.parallel, stepper.device, stepper.embedding_rows = model, limit, CPU, VOCABULARY
    stepper._share(model, limit, guesses)
    return stepper


def prompt_of(seed, length):
    return random.Random(seed).choices(range(VOCABULARY), k=length)


class LazySequences(Sequences):
    """What torch would queue on the GPU's stream comes after what is queued there; the host's memory is written at once."""

    model = None

    def __getattribute__(self, name):
        if name in ("set_params", "set_history", "set_position", "set_bias", "send_masks", "show", "move", "grow", "logits"):
            model = object.__getattribute__(self, "model")
            if model is not None:
                model.flush()
        return object.__getattribute__(self, name)


class LazyMark(Mark):
    def __init__(self, model):
        self._model, self._until = model, model.launched

    def synchronize(self):
        self._model.flush(self._until)

    def query(self):
        return self._model.done >= self._until


class LazyModel(PagedModel):
    """The same, late: what is launched runs when somebody waits for it, or by chance earlier. So it shows who reads what is not
    there yet, and who writes what is still to be read."""

    def __init__(self, context_tokens, pages=None, rows=2, seed=0):
        super().__init__(context_tokens, pages, rows)
        self._chance = random.Random(seed)
        self._queue, self.launched, self.done, self._runs = [], 0, 0, False
        self.sequences = LazySequences(CPU, self.shape, rows)
        self.sequences.model = self

    def launch(self, run):
        if self._runs:
            return run()
        self._queue.append(run)
        self.launched += 1
        return None

    def flush(self, until=None):
        if self._runs:
            return
        until, self._runs = self.launched if until is None else until, True
        try:
            while self.done < until:
                self._queue.pop(0)()
                self.done += 1
        finally:
            self._runs = False

    def step_rows(self, rows, sample_next=True, adapters=None):
        self.launch(lambda: super(LazyModel, self).step_rows(rows, sample_next, adapters))

    def sample(self, first, rows):
        self.launch(lambda: super(LazyModel, self).sample(first, rows))

    def prefill(self, ids, start, row=0, adapter=None, ends=False):
        self.flush()
        return super().prefill(ids, start, row, adapter, ends)

    def _copy(self, source, target):
        self.flush()
        super()._copy(source, target)

    def mark(self, timed=False):
        if self._chance.random() < 0.3:
            self.flush(self._chance.randint(self.done, self.launched))
        return LazyMark(self)
