"""All layers by one kernel beside the step: `python benchmarks/whole_layers.py BITS NAME… [--layers N]`.

Names are those of VARIANTS below. Each is checked against the step, but for those that leave something out, then all are timed
in turn. The first line of a check is of one layer, product by product.
"""

import argparse
import os
import statistics
import sys
import time
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
from gptq_webui.gptq.cuda import cuda_step  # noqa: E402
from gptq_webui.gptq.cuda.cuda_step import CudaStep  # noqa: E402
from gptq_webui.gptq.cuda.kv_pages import PagedMemory  # noqa: E402
from gptq_webui.gptq.cuda.row_kernels import embed, head  # noqa: E402
from gptq_webui.gptq.cuda.sample import packed_params  # noqa: E402
from gptq_webui.gptq.cuda.whole_token import WholeToken  # noqa: E402

RINGS = {2: (8, 5), 3: (4, 7), 4: (4, 5)}  # chunks that travel together, stages
OTHER_RINGS = {2: (4, 9), 3: (8, 3), 4: (2, 10)}
NO_PRODUCTS, NO_STAGING, NO_ATTENTION, NO_MEETING, NO_COPIES, WITHIN, TRACED = (1 << at for at in range(7))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "flags": {"kind": 1},
    "tagged": {"kind": 2},
    "tagged, traced": {"kind": 2, "options": TRACED},
    "tagged, parts of 256": {"kind": 2, "least": 16},
    "tagged, no copies": {"kind": 2, "options": NO_COPIES},
    "overlap": {},
    "parts of 256": {"least": 16},
    "parts of 64": {"least": 4},
    "split 16": {"other": True, "splits": (16, 16, 16, 16)},
    "split 8": {"splits": (8, 8, 8, 8)},
    "split 4": {"splits": (16, 8, 4, 8)},
    "tagged, down 16": {"kind": 2, "splits": (16, 8, 8, 16)},
    "tagged, within products": {"kind": 2, "options": WITHIN},
    "down 16": {"splits": (16, 8, 8, 16)},
    "o 16": {"splits": (16, 16, 8, 8)},
    "other batches": {"other": True},
    "tagged, split 16": {"kind": 2, "other": True, "splits": (16, 16, 16, 16)},
    "within products": {"options": WITHIN},
    "no attention": {"options": NO_ATTENTION},
    "no staging": {"options": NO_STAGING},
    "no products": {"options": NO_PRODUCTS},
    "no meeting": {"options": NO_MEETING},
    "no copies": {"options": NO_COPIES},
    "meeting, staging, attention": {"options": NO_COPIES | NO_PRODUCTS},
    "meeting, attention": {"options": NO_COPIES | NO_PRODUCTS | NO_STAGING},
    "meeting": {"options": NO_COPIES | NO_PRODUCTS | NO_STAGING | NO_ATTENTION},
    "meeting by flags": {"options": NO_COPIES | NO_PRODUCTS | NO_STAGING | NO_ATTENTION, "kind": 1},
    "copies": {"options": NO_MEETING | NO_PRODUCTS | NO_STAGING | NO_ATTENTION},
    "copies, products": {"options": NO_MEETING | NO_STAGING | NO_ATTENTION},
    "copies, products, staging": {"options": NO_MEETING | NO_ATTENTION},
    "traced": {"options": TRACED},
}
PLACE = 512


class Whole:
    def __init__(self, bits: int, layers: int) -> None:
        self.bits = bits
        self.step = CudaStep(random_models(**{**MISTRAL_7B, "layers": layers, "bits": bits}), 1024)
        self.step.sequences.set_params(0, packed_params(GenerationParams(**OFF), 0))
        self.step.sequences.use(PagedMemory(self.step.pages), 1000)
        for slab in self.step.pages._slabs.values():
            slab.view(torch.float16).normal_()
        self.step.sequences.ids[0] = 17
        self.ways: dict[str, WholeToken] = {}

    def add(self, name: str) -> WholeToken:
        step = self.step
        whole = WholeToken(step.gpu, step.shape, step.weights, step.sequences, step.buffers)
        changes = dict(VARIANTS[name])
        batch, stages = (OTHER_RINGS if changes.pop("other", False) else RINGS)[self.bits]
        whole.use(batch=batch, stages=stages, **changes)
        whole.overlap = name == "overlap"
        if "traced" in name:
            whole.trace = torch.zeros(step.gpu.processors * step.shape.layers * 20, dtype=torch.int64, device="cuda")
        self.ways[name] = whole
        return whole

    def forward(self, name: str) -> None:
        step, here = self.step, self.step.buffers
        if name == "step":
            return step.forward()
        embed(step.gpu, step.weights.embedding, step.sequences.ids, step.weights.layers[0].qkv.permutation, here.residual, here.x)
        self.ways[name].launch()
        head(step.gpu, step.weights.head, here.x_head, step.weights.final_norm, step.sequences.logits, step.shape.eps)
        return None

    def after(self, name: str, place: int) -> dict[str, torch.Tensor]:
        step, here = self.step, self.step.buffers
        step.sequences.positions[0] = place
        for each in (here.qkv, here.x_mlp, here.inner, here.x_head, step.sequences.logits):
            each.fill_(float("nan"))
        self.forward(name)
        torch.cuda.synchronize()
        found = {each: getattr(here, each)[0].double() for each in ("qkv", "x_mlp", "inner", "x_head")}
        if name != "step":
            found |= {each: self.ways[name].given(each).double() for each in ("qkv", "x_mlp", "inner")}
        return found | {"logits": step.sequences.logits[0].double()}

    def errors(self, name: str, place: int) -> dict[str, float]:
        wanted, found = self.after("step", place), self.after(name, place)
        return {each: float((wanted[each] - found[each]).abs().max() / wanted[each].abs().max()) for each in wanted}

    def graph(self, name: str, times: int) -> torch.cuda.CUDAGraph:
        self.step.sequences.positions[0] = PLACE
        self.forward(name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                self.forward(name)
        return graph


def show_trace(whole: WholeToken, layers: int) -> None:
    torch.cuda.synchronize()
    assert whole.trace is not None
    marks = whole.trace.view(-1, layers * 20)[:, : layers * 18].double().cpu()
    steps = (marks[:, 1:] - marks[:, :-1])[:, 18 * 2 : 18 * (layers - 2)].reshape(marks.shape[0], layers - 4, 18)
    names = [f"{role} {what}" for role in ("qkv", "o", "gate_up", "down") for what in ("stage", "product", "sums", "wait")]
    names[4:4] = ["attention", "wait for attention"]
    busy = steps[:128]
    print("  cycles of a layer: mean over blocks and layers, mean of the longest block, of the shortest")
    for at, name in enumerate(names):
        one = busy[:, :, at]
        print(f"  {name:20} {one.mean():7.0f} {one.max(0).values.mean():7.0f} {one.min(0).values.mean():7.0f}", flush=True)
    print(f"  together {steps.sum(2).mean():.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bits", type=int)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--turn", type=int, default=0)
    given = parser.parse_args()
    began = time.time()
    cuda_step.small_batch.every_variant = lambda gpu, products: []  # type: ignore[assignment]
    cuda_step.paged_variants = lambda gpu, shape: []  # type: ignore[assignment]
    cuda_step.OctetStep = cuda_step.ClusterStep = lambda *given: None  # type: ignore[assignment, misc]
    torch.manual_seed(1)
    bits = given.bits
    one = Whole(bits, 1)
    for name in given.names:
        if not VARIANTS[name].get("options"):
            one.add(name)
    model = Whole(bits, given.layers)
    for name in given.names:
        model.add(name)
    print(f"{bits} bits: set up after {time.time() - began:.0f} s", flush=True)
    folder = os.environ.get("W")
    if folder:  # one process after the other uses the GPU
        Path(folder, f"ready{given.turn}").touch()
        while not Path(folder, f"turn{given.turn}").exists():
            time.sleep(0.02)
    right = ["step"]
    for name in given.names:
        if not VARIANTS[name].get("options"):
            first = one.errors(name, PLACE)
            print(
                f"{bits} bits, {name}: one layer " + ", ".join(f"{each} {value:.1e}" for each, value in first.items()), flush=True
            )
            found = {
                place: model.errors(name, place)["logits"] for place in (0, 1, 15, 16, 17, 100, 127, 128, 129, 511, 512, 700, 900)
            }
            print(
                f"   {given.layers} layers, logits " + ", ".join(f"{place}: {value:.1e}" for place, value in found.items()),
                flush=True,
            )
            expected, same = model.after(name, PLACE)["logits"], True
            for _ in range(50):
                same = same and torch.equal(model.after(name, PLACE)["logits"], expected)
            print(f"   the same bits 50 times: {same}", flush=True)
        right.append(name)
    times = 8
    graphs = {name: model.graph(name, times) for name in right}
    taken: dict[str, list[float]] = {name: [] for name in right}
    for turn in range(17):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                taken[name].append(begin.elapsed_time(end) * 1e3 / times)
    for name, each in taken.items():
        print(
            f"{bits} bits, {given.layers} layers: {statistics.median(each):8.1f} us (least {min(each):8.1f})  {name}", flush=True
        )
    for name, whole in model.ways.items():
        if whole.trace is not None:
            model.forward(name)
            show_trace(whole, given.layers)


if __name__ == "__main__":
    main()
