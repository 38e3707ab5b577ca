"""The branches of a repository, as in the model card's table, and which of them fit this machine."""

from collections.abc import Mapping
from html import escape

import gradio as gr

from ..core.errors import AccessDenied, GptqWebuiError, WrongRepository
from ..core.model_ref import ModelRef
from ..core.units import format_bytes
from ..engine.advice import DEFAULT_CONTEXT_TOKENS, Advice, Offer, advise, gigabytes
from ..engine.available_memory import available_memory
from ..engine.engine import Engine
from ..engine.measured_quality import Figures, figures
from ..hub.branches import Branches, read_branches
from . import gradio_compat, html_snippets
from .access import Access
from .download_box import DownloadBox
from .hub_box import open_token_box
from .job_watcher import Job, Jobs, Updates, Watcher

_AUTOMATIC = 8192  # the context length that loaders choose automatically
_CONTEXTS = (2048, 4096, 8192, 16384, 32768)
_FITS = {
    "fits": ("gw-yes", "Fits"),
    "partly": ("gw-partly", ""),
    "tight": ("gw-partly", "Tight"),
    "not": ("gw-no", "Does not fit"),
    "no loader": ("gw-no", "No loader"),
}
# The table is below both columns: with a model loaded, that is below the window's edge. It is laid out a moment later.
# Gradio 4.37 reports a change also for a table that stays empty: then the page keeps its place.
_INTO_VIEW = """() => { setTimeout(() => {
  const box = document.querySelector('#gw-branches-box');
  if (box?.querySelector('table')) box.scrollIntoView({block: 'nearest', behavior: 'smooth'}) }, 150) }"""
_COLUMNS = (
    "Branch", "Fits", "Size", "Memory", "Bits", "GS", "Act Order", "Seq Len", "ExLlama", "Loader",
    "Perplexity", "KL", "Agreement",
)  # fmt: skip


def draw_branches(engine: Engine, box: DownloadBox, access: Access, watcher: Watcher) -> None:
    """Draw and wire the table and the choice under it. Both are hidden until a press of Show branches."""
    note = gr.HTML(elem_id="gw-branches-note")
    with gr.Row(elem_classes="gw-buttons"):
        sister = gr.Button("", size="sm", visible=False, elem_id="gw-sister")
    with gr.Column(visible=False, elem_id="gw-branch-choice", elem_classes="gw-panel") as place:
        table = gr.HTML(elem_id="gw-branch-table")
        with gr.Row(elem_classes="gw-fields"):
            branch = gradio_compat.Dropdown([], label="Branch", elem_id="gw-branch", min_width=260, scale=2)
            context = gradio_compat.Dropdown(
                [(f"{each} tokens", each) for each in _CONTEXTS],
                value=DEFAULT_CONTEXT_TOKENS,
                label="Context length to plan for",
                elem_id="gw-branch-context",
                min_width=160,
            )
        fit = gr.HTML(elem_id="gw-branch-fit")
        with gr.Row(elem_classes="gw-buttons"):
            take = gr.Button("Download this branch", variant="primary", min_width=180, elem_id="gw-branch-download")
    known = gr.State(None)  # what the Hub said: the context can change without asking again
    advised = gr.State(None)
    outputs = [note, sister, place, table, branch, fit, known, advised]
    asking = Jobs()

    def shown(found: Branches, context_tokens: int, wanted: str | None = None) -> Updates:
        advice = advise(found, engine.loaders, context_tokens, available_memory(engine.loaded))
        names = [each.branch.name for each in advice.offers if each.branch.selection]
        best = advice.best.branch.name if advice.best else None
        chosen = wanted if wanted in names else best
        wrong = wanted is not None and wanted not in names
        none_such = (
            (f"There is no branch {wanted} to download here. Choose one in the table; {chosen} is proposed.",) if wrong else ()
        )
        said = (*none_such, *found.notes, *(text for each in advice.offers for text in each.branch.notes))
        return {
            note: html_snippets.quiet(advice.reason) + html_snippets.notes(dict.fromkeys(said)),
            sister: gr.update(visible=False),
            place: gr.update(visible=True),
            table: _table(advice, {each.name: figures(each) for each in engine.library.models() if each.kind != "remote"}),
            branch: gr.update(choices=names, value=chosen),
            fit: _fit(advice, chosen),
            known: found,
            advised: advice,
        }

    def show(text: str, context_tokens: int, request: gr.Request) -> Updates:
        """Ask the Hub; the watcher shows the answer."""
        access.require_owner(request)
        hidden = {place: gr.update(visible=False), sister: gr.update(visible=False), known: None, advised: None}
        try:
            ref = ModelRef.parse(text or "")
        except GptqWebuiError as error:
            return hidden | {note: html_snippets.bad(str(error))}
        what = f"Asking the Hub about the branches of {ref.repo}"
        asking.start(request, what, lambda _job: ask(ref, context_tokens), replace=True)
        return hidden

    def ask(ref: ModelRef, context_tokens: int) -> Updates:
        try:
            found = read_branches(engine.library.hub, ref.repo)
        except WrongRepository as error:
            link = html_snippets.link(f"{engine.library.hub.endpoint}/{error.sister}", error.sister) if error.sister else ""
            update = gr.update(visible=True, value=f"Show the branches of {error.sister}") if error.sister else gr.update()
            return {note: html_snippets.bad(str(error)) + link, sister: update}
        except AccessDenied as error:
            return {note: html_snippets.bad(str(error)) + open_token_box()}
        return shown(found, context_tokens, ref.branch if ref.branch != "main" else None)

    def running(job: Job) -> Updates:
        return {note: html_snippets.working(f"{job.what} …", None)}

    def ended(job: Job, _request: gr.Request) -> Updates:
        return {note: html_snippets.bad(job.error)} if job.error else job.result

    def show_sister(label: str, context_tokens: int, request: gr.Request) -> Updates:
        access.require_owner(request)
        name = label.rpartition(" ")[2]
        return {box.ref: name} | show(name, context_tokens, request)

    def count_again(found: Branches | None, context_tokens: int, chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        return shown(found, context_tokens, chosen) if found is not None else {note: gr.update()}

    def choose(advice: Advice | None, chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        return {fit: _fit(advice, chosen) if advice is not None else ""}

    def download(advice: Advice | None, chosen: str | None, request: gr.Request) -> Updates:
        access.require_owner(request)
        if advice is None or not chosen:
            return {box.status: html_snippets.bad("Choose a branch first.")}
        ref = ModelRef(advice.found.repo, chosen)
        saved = engine.settings.for_model(ref.folder_name).get("options") or {}
        if advice.context_tokens != _AUTOMATIC and "context_tokens" not in saved:
            # the planned length is the one that will be loaded; the loaders' own choice is 8192
            engine.settings.save_for_model(ref.folder_name, options={**saved, "context_tokens": advice.context_tokens})
        return box.begin(str(ref), request)

    watcher.add(asking.part(running, ended), outputs)
    for trigger in (box.branches.click, box.ref.submit):
        watcher.after(trigger(show, [box.ref, context], outputs, **gradio_compat.PRESS))
    watcher.after(sister.click(show_sister, [sister, context], [box.ref, *outputs], **gradio_compat.PRESS))
    table.change(None, None, None, js=_INTO_VIEW, **gradio_compat.EVENT)
    context.input(count_again, [known, context, branch], outputs, **gradio_compat.EVENT)
    branch.input(choose, [advised, branch], fit, **gradio_compat.EVENT)
    watcher.after(take.click(download, [advised, branch], box.status, **gradio_compat.PRESS))


def _fit(advice: Advice, chosen: str | None) -> str:
    """HTML for the chosen branch: whether it fits, and how much there is to download."""
    offer = next((each for each in advice.offers if each.branch.name == chosen), None)
    if offer is None or offer.branch.selection is None:
        return ""
    loader = f" Loader: {offer.fit.loader} ({offer.fit.reason})." if offer.fit.loader else ""
    text = f"{offer.fit.text}. {offer.branch.selection.summary}.{loader}"
    return html_snippets.good(text) if offer.fit.state == "fits" else html_snippets.notes([text])


def _table(advice: Advice, on_disk: Mapping[str, Figures]) -> str:
    """`on_disk`: names of the models that are on this computer, with what was measured of them."""
    head = "".join(f"<th>{escape(each)}</th>" for each in _COLUMNS)
    body = "".join(
        _row(offer, offer is advice.best, on_disk.get(ModelRef(advice.found.repo, offer.branch.name).folder_name))
        for offer in advice.offers
    )
    origins = (
        (each.branch.name, each.branch.damp_percent, each.branch.dataset, each.branch.commit[:8], measured.basis or "-")
        for each in advice.offers
        for measured in (on_disk.get(ModelRef(advice.found.repo, each.branch.name).folder_name, Figures()),)
    )
    more = html_snippets.table(("Branch", "Damp %", "GPTQ dataset", "Commit", "Measured here on"), origins)
    front = advice.found.model_card
    keys = {"Base model": "base_model", "Licence": "license", "Quantised by": "quantized_by"}
    facts = [(name, front.text(key)) for name, key in keys.items()]
    return html_snippets.scrolling(head, body) + f"<details><summary>More</summary>{html_snippets.facts(facts)}{more}</details>"


def _row(offer: Offer, best: bool, here: Figures | None) -> str:
    """`here`: None if the branch is not on this computer."""
    branch, quantize, model_card = offer.branch, offer.branch.quantize, offer.branch.model_card
    if branch.selection is None:
        said = escape(str(branch.error))
        name = f"{escape(branch.name)}<small>{said}</small>"
        return f'<tr><td class="gw-name">{name}</td><td colspan="{len(_COLUMNS) - 1}"></td></tr>'
    group = model_card.group_size if quantize is None else "None" if quantize.group_size == -1 else str(quantize.group_size)
    kind, words = _FITS[offer.fit.state]
    words = words or offer.fit.text.partition(":")[0]
    cells = (
        format_bytes(branch.size_bytes).replace(" ", "\N{NO-BREAK SPACE}"),
        gigabytes(offer.fit.needs_bytes) if offer.fit.needs_bytes else "",
        model_card.bits if quantize is None else str(quantize.bits),
        group,
        model_card.act_order if quantize is None else "Yes" if quantize.desc_act else "No",
        model_card.seq_len,
        branch.exllama,
        offer.fit.loader,
    )
    tag = ' <span class="gw-tag">recommended</span>' if best else ""
    tag += ' <span class="gw-tag gw-here">on this computer</span>' if here is not None else ""
    name = f"{escape(branch.name)}{tag}<small>{escape(model_card.description)}</small>"
    row = "".join(f"<td>{escape(each)}</td>" for each in cells)
    measured = here or Figures()
    row += "".join(f'<td title="{escape(measured.basis)}">{escape(each)}</td>' for each in measured.texts)
    mark = ' class="gw-best"' if best else ""
    return f'<tr{mark}><td class="gw-name">{name}</td><td class="{kind}">{escape(words)}</td>{row}</tr>'
