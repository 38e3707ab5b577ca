"""The Compare tab: two models, one prompt, side by side, and a blind vote.

Everything that is shown comes from `_Shown.look`, which a page's watcher calls: handlers only change what it reads. Before the
vote of a blind comparison nothing that the server sends has a model's name in it; the fields with the two names are hidden, too.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from ..core.errors import GptqWebuiError
from ..engine.comparison import VOTES, Comparer, Comparison, Side
from ..engine.comparison_picture import picture
from ..engine.engine import Engine
from ..engine.vote_book import VoteBook
from . import gradio_compat
from .access import Access
from .browser_file import save_picture_script
from .html_snippets import bad, facts, good, quiet, table, working
from .job_watcher import Job, Jobs, Updates, Watcher
from .parameters_tab import ParametersTab
from .share_box import copy_script

_ASKED_CHARACTERS = 160  # of a prompt in the question for a vote: after a reload its field is empty
_INTRO = (
    "Both models answer the same prompt with the values of the Parameters tab. A blind comparison shows no names "
    "until you have voted."
)


@dataclass(frozen=True)
class CompareTab:
    show: Callable[[gr.Request], Updates]  # for `outputs` when the tab is opened; nothing for guests
    outputs: list[Any]


@dataclass
class _State:
    """The last comparison of each login, and what was said to it."""

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)  # HTML
    job_of: str = ""  # whose job runs, or ran last


def build(
    engine: Engine, watcher: Watcher, parameters: ParametersTab, access: Access | None = None, votes: VoteBook | None = None
) -> CompareTab:
    """Draw the tab and wire it."""
    access, book = access or Access(), votes or VoteBook()
    comparer, jobs, state = Comparer(engine), Jobs(shared=True), _State()
    with gr.Column(elem_classes="gw-panel"):
        gr.HTML(quiet(_INTRO), elem_id="gw-compare-intro")
        with gr.Row(elem_classes="gw-fields", elem_id="gw-compare-models") as choice:
            first, second = (
                gradio_compat.Dropdown(
                    [], value=None, label=label, filterable=True, allow_custom_value=False, elem_id=f"gw-compare-{at}"
                )
                for at, label in (("first", "Model A"), ("second", "Model B"))
            )
        lacks = gr.HTML(elem_id="gw-compare-lacks")
        prompt = gr.Textbox(label="Prompt", lines=3, max_lines=12, elem_id="gw-compare-prompt")
        blind = gr.Checkbox(True, label="Blind", info="Names and speeds are shown after your vote.", elem_id="gw-compare-blind")
        with gr.Row(elem_classes="gw-buttons"):
            begin = gr.Button("Compare", variant="primary", size="sm", min_width=120, elem_id="gw-compare-start")
            stop = gr.Button("Stop", size="sm", min_width=90, visible=False, elem_id="gw-compare-stop")
        status = gr.HTML(elem_id="gw-compare-status")
    with gr.Row(elem_classes="gw-columns", elem_id="gw-compare-answers"):
        answers = [gr.HTML(elem_id=f"gw-compare-answer-{at}") for at in (1, 2)]
    with gr.Row(elem_classes="gw-buttons", visible=False, elem_id="gw-compare-votes") as voting:
        ballots = {each: gr.Button(text, size="sm", min_width=120, elem_id=f"gw-vote-{each}") for each, text in VOTES.items()}
    with gr.Column(visible=False, elem_id="gw-compare-share") as share:
        text = gr.Textbox(label="As Markdown", lines=3, max_lines=10, interactive=False, elem_id="gw-compare-markdown")
        with gr.Row(elem_classes="gw-buttons"):
            copy = gr.Button("Copy", size="sm", min_width=80, elem_id="gw-compare-copy")
            save = gr.Button("Save as a picture", size="sm", min_width=140, elem_id="gw-compare-save")
        as_picture = gr.Textbox(elem_classes="gw-hidden", show_label=False, container=False)
        file_name = gr.Textbox("two-models.png", elem_classes="gw-hidden", show_label=False, container=False)
    tally = gr.HTML(elem_id="gw-compare-tally")
    outputs = [choice, begin, stop, status, *answers, voting, share, text, as_picture, tally]

    def updates(owner: str, job: Job | None) -> Updates:
        mine = state.comparisons.get(owner)
        hidden = mine is not None and not mine.is_open and (job is not None or mine.is_done)
        ready = mine is not None and mine.is_open and mine.is_done
        said = working(f"{job.text} …", None) if job is not None else state.said.get(owner, "")
        sides = mine.sides if mine is not None else (None, None)
        waits = mine is not None and mine.waits_for_vote and job is None
        return {
            choice: gr.update(visible=not hidden),
            begin: gr.update(visible=job is None),
            stop: gr.update(visible=job is not None),
            status: said + (quiet(mine.note) if mine is not None and job is None else ""),
            **{box: _answer(at, side, mine, job) for at, (box, side) in enumerate(zip(answers, sides, strict=True), 1)},
            voting: gr.update(visible=waits),
            share: gr.update(visible=ready and job is None),
            text: mine.markdown() if mine is not None and ready else "",
            as_picture: picture(mine) if mine is not None and ready else "",
            tally: "" if hidden else _tally(book, owner),
        }

    def look(request: gr.Request) -> Iterator[Updates]:
        """What the page of an owner shows, until nothing runs."""
        if not access.is_owner(request):
            return
        owner = owner_of(request)
        while True:
            job = jobs.running()
            yield updates(owner, job)
            if job is None:
                return

    def show(request: gr.Request) -> Updates:
        if not access.is_owner(request):
            return {first: gr.update()}
        if gradio_compat.LAZY_TABS:
            watcher.redraw_soon(request)
        names = [each.name for each in engine.library.models() if each.kind not in ("lora", "incomplete")]
        missing = (
            "There is no model yet. Download two in the Model tab." if not names else "Download another model in the Model tab."
        )
        return {
            first: gr.update(choices=names),
            second: gr.update(choices=names),
            lacks: quiet(missing) if len(names) < 2 else "",
        }

    def start(request: gr.Request, one: Any, other: Any, question: Any, hide: Any, *values: Any) -> None:
        access.require_owner(request)
        owner = owner_of(request)
        if (busy := jobs.running()) is not None:
            state.said[owner] = bad("Two models are being compared already. Wait for that, or press Stop.")
            jobs.attach(request, busy)
            return
        state.comparisons.pop(owner, None)

        def begun(comparison: Comparison) -> None:
            state.comparisons[owner] = comparison

        def work(job: Job) -> None:
            try:
                params = parameters.params(values)
                done = comparer.run(
                    [str(one or ""), str(other or "")], str(question or ""), params, job.cancel,
                    blind=bool(hide), begun=begun, say=lambda said: setattr(job, "text", said),
                )  # fmt: skip
                asked = textwrap.shorten(done.prompt, _ASKED_CHARACTERS, placeholder=" …")
                asks = quiet(f"Which answer is better? You asked: {asked}")
                state.said[owner] = asks if done.blind else good("Both have answered.")
            except GptqWebuiError as error:
                state.comparisons.pop(owner, None)
                state.said[owner] = bad(str(error))

        jobs.start(request, "Comparing", work)

    def end(request: gr.Request) -> None:
        access.require_owner(request)
        if (job := jobs.running()) is not None:
            job.cancel.set()

    def vote_for(choice: str) -> Callable[[gr.Request], None]:
        def vote(request: gr.Request) -> None:
            access.require_owner(request)
            owner = owner_of(request)
            mine = state.comparisons.get(owner)
            if mine is None:
                return
            try:
                book.vote(owner, mine, choice)
                state.said[owner] = good(f"{VOTES[choice]}. Your vote is counted.")
            except GptqWebuiError as error:
                state.said[owner] = bad(str(error))

        return vote

    watcher.add(look, outputs, live=[status, *answers])
    given = [first, second, prompt, blind, *parameters.fields]
    watcher.after(begin.click(start, given, None, **gradio_compat.PRESS))
    stop.click(end, None, None, **gradio_compat.NOW)
    for each, button in ballots.items():
        watcher.after(button.click(vote_for(each), None, None, **gradio_compat.PRESS))
    script = copy_script("gw-compare-copy", "gw-compare-markdown", "Copy")
    copy.click(None, text, None, js=script, **gradio_compat.EVENT)
    save.click(None, [file_name, as_picture], None, js=save_picture_script(), **gradio_compat.EVENT)
    return CompareTab(show, [first, second, lacks])


def owner_of(request: gr.Request) -> str:
    return str(getattr(request, "username", None) or "")


def _answer(at: int, side: Side | None, comparison: Comparison | None, job: Job | None) -> str:
    """HTML of one answer. A hidden one comes when both are there, without its figures: they would tell the models apart."""
    if side is None or comparison is None:
        return ""
    if not comparison.is_open and (job is not None or not comparison.is_done):
        return ""
    name = f"Answer {at}" + (f": {side.name}" if comparison.is_open else "")
    figures = facts([("Model", side.badge), *side.figures]) if comparison.is_open else ""
    return f'<section class="gw-compared"><h3>{escape(name)}</h3>{figures}<div>{escape(side.text)}</div></section>'


def _tally(book: VoteBook, owner: str) -> str:
    rows = [(each.name, str(each.won), str(each.lost), str(each.tied), f"{each.share:.0%}") for each in book.tally(owner)]
    if not rows:
        return ""
    return quiet("Blind votes so far; a tie counts as a half.") + table(("Model", "Won", "Lost", "Tied", "Share"), rows)
