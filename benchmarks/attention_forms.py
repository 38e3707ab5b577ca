"""Times steps of one to eight rows with attention by clusters of blocks (cluster_attention.cu) beside the same steps without:
`python benchmarks/attention_forms.py [--bits 4] [--layers 8]`. Mistral's shape, random weights, both forms in turns."""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import script  # noqa: E402

script.register()

from random_models import MISTRAL_7B, random_models  # noqa: E402
from tune import OFF  # noqa: E402

from gptq_webui.core.params import GenerationParams  # noqa: E402
from gptq_webui.gptq.cuda.attention import attend, short_tokens  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params, sample  # noqa: E402

LENGTHS = (64, 512, 640, 768, 1000, 1500, 2000, 3000)
STEPS, TURNS = 16, 8  # steps of a reading, readings of each form
ROWS = (1, 2, 4, 8)


class Forms:
    """Steps of some rows, recorded in both forms; and attention alone, a launch for each layer."""

    def __init__(self, bits: int, layers: int) -> None:
        context = LENGTHS[-1] + 2 * STEPS
        self.step = step = CudaStep(
            random_models(**{**MISTRAL_7B, "layers": layers, "bits": bits}), context, parallel=ROWS[-1]
        )  # fmt: skip
        self.sequences, self.layers = step.sequences, layers
        self.memories = [PagedMemory(step.pages) for _ in range(ROWS[-1])]  # who drops one gives its pages to the next
        for row, memory in enumerate(self.memories):
            self.sequences.set_params(row, packed_params(GenerationParams(**OFF), row))
            self.sequences.use(memory, context, row)
        for slab in step.pages._slabs.values():
            slab.view(torch.float16).normal_()
        self.graphs: dict[tuple[int, str, bool], Any] = {}
        self.at(LENGTHS[0])
        for rows in ROWS:
            for short in (False, True):
                for what, run in (("step", self._step), ("alone", self._attention)):
                    run(rows, short)  # what is launched first is not recorded
                    torch.cuda.synchronize()
                    self.graphs[rows, what, short] = step.recorder.record(partial(run, rows, short))

    def _step(self, rows: int, short: bool) -> None:
        if rows == 1:
            self.step.forward(short)
        else:
            self.step.batch.forward(rows, short=short)
        sample(self.step.gpu, self.sequences, 0, rows)

    def _attention(self, rows: int, short: bool) -> None:
        step = self.step
        here, work = step.batch._buffers.first(rows), step.batch._work
        for layer in range(self.layers):
            attend(step.gpu, step.shape, step.weights, layer, self.sequences, work, qkv=here.qkv, out=here.attended, short=short)

    def at(self, tokens: int) -> None:
        self.sequences.positions.fill_(tokens)
        self.sequences.ids.fill_(5)

    def logits(self, rows: int, short: bool, tokens: int) -> torch.Tensor:
        self.at(tokens)
        self._step(rows, short)
        return self.sequences.logits[:rows].double()

    def times(self, rows: int, what: str, tokens: int) -> tuple[float, float]:
        """Microseconds of a replay without and with clusters: medians of readings in turns."""
        found: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(TURNS):
            for short in (False, True) if turn % 2 else (True, False):
                self.at(tokens)
                found[short].append(reading(self.graphs[rows, what, short].replay))
        return statistics.median(found[False]), statistics.median(found[True])


def reading(run: Callable[[], object]) -> float:
    """Microseconds of one call."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(STEPS):
        run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) * 1e3 / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, f"{options.layers} layers, us of a step and of attention alone")
    for bits in options.bits:
        forms = Forms(bits, options.layers)
        for rows in ROWS:
            short = short_tokens(forms.step.gpu, forms.step.shape, rows)
            print(f"{bits} bits, {rows} rows, short up to {short} tokens: without | with clusters (more in a layer)")
            for tokens in LENGTHS:
                wanted, found = forms.logits(rows, False, tokens), forms.logits(rows, True, tokens)
                apart = float((found - wanted).norm() / wanted.norm())
                times = [forms.times(rows, what, tokens) for what in ("step", "alone")]
                each = "; ".join(f"{a:.1f} | {b:.1f} ({(b - a) / options.layers:+.2f})" for a, b in times)
                print(f"  {tokens}: {each}; logits {apart:.0e} apart", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
