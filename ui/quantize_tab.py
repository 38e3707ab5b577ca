"""The Quantize tab: GPTQ folders out of a 16-bit model, one for each branch.

The work is engine/quantize_job.py; here is one run for all pages, because two would fight for the memory. A run that was stopped
or killed goes on where it ended when the same values are started again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.errors import BadParameter, LoadCancelled
from ..core.quantize_config import BITS, QuantizeConfig
from ..core.units import format_duration, plural
from ..engine.calibration_text import BUILT_IN
from ..engine.engine import Engine
from ..engine.layer_clock import LayerClock
from ..engine.quantize_job import USUAL_BRANCHES, QuantizeJob, branch_name, parse_branch, run
from ..engine.quantize_source import find_source
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, quiet, table
from .job_watcher import Job, Updates, Watcher
from .run_buttons import RunButtons

_GROUPS = ("128", "64", "32", "-1")
_MEASURED_TOKENS = 4096
_HEAD_BITS = 8  # of an output layer that is packed
_NO_SOURCE = (
    "There is no 16-bit model in your models folders yet. Write the name of one on the Hub, for example "
    "HuggingFaceTB/SmolLM2-135M-Instruct, a small one: Quantize first downloads it into the models folder."
)


@dataclass(frozen=True)
class QuantizeTab:
    show: Callable[[gr.Request], Updates]  # for `outputs` when the tab is opened; nothing for guests
    outputs: list[Any]


@dataclass
class _Run:
    """What the page shows of a run beside its Job."""

    branches: list[str] = field(default_factory=list)
    rows: list[tuple[str, ...]] = field(default_factory=list)  # of the table of layers, the newest first
    said: list[str] = field(default_factory=list)


def build(engine: Engine, watcher: Watcher, access: Access | None = None) -> QuantizeTab:
    """Draw the tab and wire it."""
    access = access or Access()
    with gr.Row(elem_classes="gw-columns"):
        with gr.Column(scale=3, min_width=320), gr.Column(elem_classes="gw-panel"):
            with gr.Column(elem_classes="gw-fields"):
                source = gradio_compat.Dropdown(
                    [],
                    value=None,
                    label="16-bit model",
                    info="One of yours, a folder, or owner/name: a repository is downloaded first.",
                    allow_custom_value=True,
                    filterable=True,
                    elem_id="gw-quantize-source",
                )
                lacks = gr.HTML(elem_id="gw-quantize-lacks")
                branches = gradio_compat.CheckboxGroup(
                    [(_words(each), each) for each in USUAL_BRANCHES],
                    value=[USUAL_BRANCHES[0]],
                    label="Branches",
                    info="Each becomes a folder of its own; one pass over the calibration text makes all of them.",
                    elem_id="gw-quantize-branches",
                )
            with gr.Accordion("Another branch", open=False, elem_id="gw-quantize-another"):
                with gr.Row(elem_classes="gw-fields"):
                    bits = gradio_compat.Dropdown(
                        ["none", *map(str, BITS)],
                        value="none",
                        label="Bits",
                        info="none: those above",
                        elem_id="gw-quantize-bits",
                    )
                    group = gradio_compat.Dropdown(
                        list(_GROUPS), value=_GROUPS[0], label="Group size", info="-1: no groups", elem_id="gw-quantize-group"
                    )
                act_order = gr.Checkbox(
                    True, label="Act-order", info="The most active inputs first: more exact.", elem_id="gw-quantize-act-order"
                )
            with gr.Accordion("Calibration and format", open=False, elem_id="gw-quantize-more"):
                dataset = gr.Textbox(
                    label="Calibration text",
                    info="A .txt or .jsonl file on this computer. Empty: Python's manual and a few conversations.",
                    elem_id="gw-quantize-dataset",
                )
                with gr.Row(elem_classes="gw-fields"):
                    samples = gradio_compat.Number(
                        128, precision=0, label="Samples", info="at most", minimum=1, elem_id="gw-quantize-samples"
                    )
                    length = gradio_compat.Number(
                        4096,
                        precision=0,
                        label="Tokens of a sample",
                        info="at most the model's context",
                        minimum=1,
                        elem_id="gw-quantize-length",
                    )
                    damp = gradio_compat.Number(
                        0.1, label="Damping", info="share of the Hessian's mean", elem_id="gw-quantize-damp"
                    )
                with gr.Row(elem_classes="gw-fields"):
                    symmetric = gr.Checkbox(
                        True, label="Symmetric", info="Every loader opens it.", elem_id="gw-quantize-symmetric"
                    )
                    newer = gr.Checkbox(
                        False, label="Layout gptq_v2", info="For GPTQModel; older programs cannot open it.",
                        elem_id="gw-quantize-v2",
                    )  # fmt: skip
                head = gr.Checkbox(
                    False, label="Pack the output layer, too",
                    info="lm_head in 8 bits: smaller and faster. GPTQModel and this program open it.",
                    elem_id="gw-quantize-head",
                )  # fmt: skip
                leave = gr.Textbox(
                    label="Layers that stay in 16 bits",
                    info="Parts of their names, such as experts or down_proj, with spaces between.",
                    elem_id="gw-quantize-leave",
                )
                output = gr.Textbox(
                    label="Folder for the branches",
                    info="Empty: the models folder, where the Model tab finds them.",
                    elem_id="gw-quantize-output",
                )
            measured = gr.Checkbox(
                True,
                label="Measure each branch",
                info="Perplexity and KL divergence to the original, for the model card.",
                elem_id="gw-quantize-measure",
            )
            buttons = RunButtons("Quantize", "gw-quantize", access, stopping="Stopping after this layer")
        with gr.Column(scale=2, min_width=320), gr.Column(elem_classes="gw-panel"):
            status = gr.HTML(_idle(), elem_id="gw-quantize-status")
            layers = gr.HTML(elem_id="gw-quantize-layers")
    fields = [
        source,
        branches,
        bits,
        group,
        act_order,
        dataset,
        samples,
        length,
        damp,
        symmetric,
        newer,
        head,
        leave,
        output,
        measured,
    ]
    state = _Run()

    def show(request: gr.Request) -> Updates:
        if not access.is_owner(request):
            return {source: gr.update()}
        buttons.look(request)
        names = [each.name for each in engine.library.models() if each.kind == "plain"]
        return {source: gr.update(choices=names), lacks: "" if names else quiet(_NO_SOURCE)}

    def start(request: gr.Request, *given: Any) -> Updates:
        values = _Values(*given)
        try:
            configs = values.branches()
        except BadParameter as error:
            return {status: bad(str(error))}

        def work(job: Job) -> list[Path]:
            state.branches, state.rows, state.said = [branch_name(each) for each in configs], [], []
            return _make(engine, values, configs, job, state)

        return buttons.start(request, f"Quantizing {values.source}", work)

    def done(folders: list[Path]) -> str:
        said = good(f"Made {plural(len(folders), 'folder')}. Choose one in the Model tab to chat with it.")
        return said + "".join(quiet(each.name) for each in folders)

    buttons.wire(
        watcher, start, fields, status, done,
        said=lambda: state.said, others=[layers], show=lambda: {layers: _layers(state)},
    )  # fmt: skip
    return QuantizeTab(show, [source, lacks])


@dataclass(frozen=True)
class _Values:
    """The fields, as the page sends them."""

    source: str | None
    usual: list[str] | None
    bits: str | None
    group: str | None
    act_order: bool
    dataset: str | None
    samples: float | None
    length: float | None
    damp: float | None
    symmetric: bool
    newer: bool
    head: bool
    leave: str | None
    output: str | None
    measured: bool

    def branches(self) -> list[QuantizeConfig]:
        """What is to be made. Raises BadParameter for values that are not possible."""
        if not (self.source or "").strip():
            raise BadParameter("Choose a 16-bit model, or write owner/name.")
        damp = self.damp if self.damp is not None else 0.1
        if not 0 < damp < 1:
            raise BadParameter(f"The damping {damp:g} is not possible. Write a number between 0 and 1; 0.1 is usual.")
        for name, value in (("samples", self.samples), ("tokens of a sample", self.length)):
            if value is None or value < 1:
                raise BadParameter(f"The number of {name} must be 1 or more.")
        format = "gptq_v2" if self.newer else "gptq"
        base = QuantizeConfig(4, 128, self.act_order, self.symmetric, format, damp_percent=damp)
        names = list(self.usual or [])
        if self.bits not in (None, "none"):
            names.append(f"gptq-{self.bits}bit-{self.group}g-actorder_{bool(self.act_order)}")
        if not names:
            raise BadParameter("Choose at least one branch.")
        return [parse_branch(each, base) for each in dict.fromkeys(names)]


def _make(engine: Engine, values: _Values, configs: list[QuantizeConfig], job: Job, state: _Run) -> list[Path]:
    """Find the model and make the folders. Raises LoadCancelled where Stop was pressed, and what quantize_job.run raises."""
    stopped = "Stopped. Finished layers are kept: press Quantize with the same values to go on."

    def say(text: str) -> None:
        job.text = text.rstrip(".")
        if text.startswith(
            ("Calibration:", "Everything", "There is no GPU", "Stay in 16 bits", "The output layer", "Layer ", "A group size")
        ):
            state.said.append(text)
        if job.cancel.is_set():
            raise LoadCancelled(stopped)

    def downloaded(progress: Any) -> None:
        job.text, job.share = progress.text, progress.done_bytes / progress.total_bytes if progress.total_bytes else None

    clock = LayerClock()

    def report(done: Any) -> None:
        left_s = clock.left_s(done.index, done.count, resumed=done.resumed)
        left = f"{format_duration(left_s)} left" if left_s is not None else "made by an earlier run"
        job.share, job.text = (done.index + 1) / done.count, f"Layer {done.index + 1} of {done.count}, {left}"
        state.rows.insert(
            0, (done.name or str(done.index + 1), *(f"{done.errors[each]:.3%}" for each in state.branches if each in done.errors))
        )
        if job.cancel.is_set():
            raise LoadCancelled(stopped)

    source = find_source(engine, str(values.source).strip(), say, downloaded, job.cancel)
    if job.cancel.is_set():
        raise LoadCancelled("Stopped. What arrived is kept: press Quantize to go on.")
    job.share = None
    place = (values.output or "").strip()
    output = Path(place).expanduser().absolute() if place else engine.library.roots[0]
    dataset = (values.dataset or "").strip() or BUILT_IN
    tokens = int(values.length or 1)
    if source.context_tokens:
        tokens = min(tokens, source.context_tokens)
    wanted = QuantizeJob(
        source, output, configs, dataset, tokens, int(values.samples or 1), _MEASURED_TOKENS if values.measured else 0,
        _HEAD_BITS if values.head else 0, (values.leave or "").split(),
    )  # fmt: skip
    return run(wanted, report, say)


def _layers(state: _Run) -> str:
    if not state.rows:
        return ""
    columns = ("Layer", *(f"Error, {_words(each)}" for each in state.branches))
    return table(columns, state.rows)


def _words(branch: str) -> str:
    """'4-bit, group 128, act-order'."""
    return parse_branch(branch, QuantizeConfig(4, 128, True, True)).summary


def _idle() -> str:
    return quiet(
        "Makes GPTQ models as TheBloke made them. One layer at a time is in the GPU's memory, so the model may be larger. "
        "Without a GPU it works too, and takes much longer."
    )
