"""Training a LoRA adapter, in the Quantize tab: from a file of conversations to an adapter beside the model.

The work is engine/train_job.py; here is one run for all pages. A run that was stopped or killed goes on when the same values are
started again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..core.errors import BadParameter, GptqWebuiError, LoadCancelled
from ..core.units import format_duration
from ..engine.engine import Engine
from ..engine.layer_clock import LayerClock
from ..engine.train_job import TrainJob, curve, folder_for, run
from ..gptq.training_recipe import Recipe, StepDone, require_peft
from . import gradio_compat
from .access import Access
from .html_snippets import bad, good, notes, quiet
from .job_watcher import Job, Updates, Watcher
from .run_buttons import RunButtons

_POINTS = 120  # of the loss curve
_WIDTH, _HEIGHT, _MARGIN = 480, 120, 4


@dataclass(frozen=True)
class TrainBox:
    show: Callable[[gr.Request], Updates]  # for `outputs` when the tab is opened; nothing for guests
    outputs: list[Any]


@dataclass
class _Run:
    """What the page shows of a run beside its Job."""

    losses: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def build(engine: Engine, watcher: Watcher, access: Access) -> TrainBox:
    """Draw the box and wire it."""
    with gr.Row(elem_classes="gw-columns"):
        with gr.Column(scale=3, min_width=320):
            with gr.Column(elem_classes="gw-fields"):
                model = gradio_compat.Dropdown(
                    [], value=None, label="Model", info="Its weights stay as they are.", elem_id="gw-train-model"
                )
                data = gr.Textbox(
                    label="Conversations",
                    info="A .jsonl, .json or .txt file on this computer: messages, ShareGPT, Alpaca or plain text.",
                    elem_id="gw-train-data",
                )
                name = gr.Textbox(label="Name of the adapter", info="A folder beside the model.", elem_id="gw-train-name")
            with gr.Accordion("Rank, rate and length", open=False, elem_id="gw-train-more"):
                with gr.Row(elem_classes="gw-fields"):
                    epochs = gradio_compat.Number(
                        3, precision=0, label="Epochs", info="times each text is read", minimum=1, elem_id="gw-train-epochs"
                    )
                    rank = gradio_compat.Number(
                        16, precision=0, label="Rank", info="size of the adapter", minimum=1, elem_id="gw-train-rank"
                    )
                    rate = gradio_compat.Number(2e-4, label="Learning rate", info="the highest", elem_id="gw-train-rate")
                with gr.Row(elem_classes="gw-fields"):
                    batch = gradio_compat.Number(
                        4, precision=0, label="Batch size", info="texts of a step", minimum=1, elem_id="gw-train-batch"
                    )
                    length = gradio_compat.Number(
                        1024,
                        precision=0,
                        label="Cutoff length",
                        info="most tokens",
                        minimum=1,
                        elem_id="gw-train-length",
                    )
            buttons = RunButtons("Train", "gw-train", access, stopping="Stopping after this step")
            lacks = gr.HTML(elem_id="gw-train-lacks")  # what must be there before one can train
        with gr.Column(scale=2, min_width=320):
            status = gr.HTML(_idle(), elem_id="gw-train-status")
            losses = gr.HTML(elem_id="gw-train-losses")
    fields = [model, data, name, epochs, rank, rate, batch, length]
    state = _Run()

    def show(request: gr.Request) -> Updates:
        if not access.is_owner(request):
            return {model: gr.update()}
        buttons.look(request)
        names = [each.name for each in engine.library.models() if each.is_packed]
        said = "" if names else quiet("There is no GPTQ model yet. Download one in the Model tab, or make one above.")
        try:
            require_peft()
            can = True
        except GptqWebuiError as error:
            can, said = False, notes([f"{error}, then open this tab again."])
        return {model: gr.update(choices=names), lacks: said, buttons.button: gr.update(interactive=can)}

    def start(request: gr.Request, *given: Any) -> Updates:
        try:
            job = _job(engine, *given)
        except GptqWebuiError as error:
            return {status: bad(str(error))}

        def work(page_job: Job) -> Path:
            state.losses, state.said = [], []
            return _train(job, page_job, state)

        return buttons.start(request, f"Training {job.output.name}", work)

    def done(folder: Path) -> str:
        return good(f"Made the adapter {folder.name}. Load its model, and choose it in Conversation settings.")

    def shown() -> Updates:
        return {losses: picture(state.losses)}

    buttons.wire(watcher, start, fields, status, done, said=lambda: state.said, others=[losses], show=shown)
    return TrainBox(show, [model, lacks, buttons.button])


def _job(
    engine: Engine,
    model: str | None,
    data: str | None,
    name: str | None,
    epochs: float | None,
    rank: float | None,
    rate: float | None,
    batch: float | None,
    length: float | None,
) -> TrainJob:
    """What the fields say. Raises BadParameter."""
    if not (model or "").strip():
        raise BadParameter("Choose a model to train on.")
    if not (data or "").strip():
        raise BadParameter("Write the name of a file with conversations.")
    file = Path(str(data).strip()).expanduser().absolute()
    base = engine.library.get(str(model))
    output = folder_for(base, name or "", file)
    recipe = Recipe(int(rank or 0), 2 * int(rank or 0), 0.0, (), float(rate or 0), int(epochs or 0), int(batch or 0))
    return TrainJob(base, file, output, recipe, int(length or 0))


def _train(job: TrainJob, page_job: Job, state: _Run) -> Path:
    """Raises LoadCancelled where Stop was pressed, and what train_job.run raises."""
    clock = LayerClock()

    def say(text: str) -> None:
        page_job.text = text.rstrip(".")
        if not text.startswith("Reading"):
            state.said.append(text)
        _go_on()

    def report(done: StepDone) -> None:
        state.losses = list(done.losses)
        page_job.share = done.step / done.count
        left_s = clock.left_s(done.step - 1, done.count, resumed=done.resumed)
        if left_s is None:
            page_job.text = f"Steps 1 to {done.step} were made by an earlier run"
        else:
            page_job.text = f"Step {done.step} of {done.count}, loss {done.losses[-1]:.3f}, {format_duration(left_s)} left"
        _go_on()

    def _go_on() -> None:
        if page_job.cancel.is_set():
            raise LoadCancelled("Stopped. The last step is kept: press Train with the same values to go on.")

    return run(job, report, say)


def picture(losses: Sequence[float]) -> str:
    """The losses as a curve from the highest to the lowest, the newest on the right; nothing before the second step."""
    means = curve(losses, _POINTS)
    if len(means) < 2:
        return ""
    least, most = min(means), max(means)
    span, height = most - least or 1.0, _HEIGHT - 2 * _MARGIN
    heights = [_MARGIN + height * (most - each) / span for each in means]
    points = " ".join(f"{at / (len(means) - 1) * _WIDTH:.1f},{each:.1f}" for at, each in enumerate(heights))
    words = f"Loss of {len(losses)} steps: {losses[0]:.3f} at first, {losses[-1]:.3f} now"
    words += f"; the curve is from {least:.3f} to {most:.3f}"
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="2" vector-effect="non-scaling-stroke"/>'
    how = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(words)}"'
    return f'<svg class="gw-losses" {how}>{line}</svg>' + quiet(f"{words}.")


def _idle() -> str:
    return quiet(
        "Teaches a model your conversations: only the answers count. What is learned is a LoRA adapter, a small folder that each "
        "conversation can choose."
    )
