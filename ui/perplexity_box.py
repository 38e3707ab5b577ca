"""The Perplexity button: how well the loaded model predicts a text, as one line to copy."""

import gradio as gr

from ..engine.engine import Engine
from ..engine.evaluation import default_text
from ..engine.perplexity import measure
from .access import Access
from .html_snippets import quiet
from .job_watcher import Job, Watcher
from .measure_box import MeasureBox, draw_measurement

_TOKENS = 2048  # of Python's manual: seconds on a GPU, a minute or two of a small model without one


def draw_perplexity(engine: Engine, access: Access, watcher: Watcher) -> MeasureBox:
    """Draw and wire."""
    gr.HTML(quiet("Lower is better. Compare models that have the same tokenizer, on the same text."))
    text = gr.Textbox(
        label="Text",
        placeholder="Paste a text. Empty: a part of Python's manual.",
        lines=3,
        max_lines=8,
        elem_id="gw-perplexity-text",
    )

    def work(job: Job, given: str) -> object:
        own = bool((given or "").strip())
        what, name, most = (given, "your text", None) if own else (default_text(), "Python's manual", _TOKENS)
        return measure(engine, what, name, job.cancel, tokens=most, progress=lambda said: setattr(job, "text", said))

    return draw_measurement("Measure", "gw-perplexity", work, access, watcher, given=text, lines=(2, 6))
