"""How the page looks: a theme and a style sheet. It uses system fonts, so nothing is fetched from elsewhere."""

import re

import gradio as gr

from . import chat_style

TITLE = "gptq-webui"


def theme() -> gr.Theme:
    """Slate and one blue-green accent, in light and dark."""
    return gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.slate,
        neutral_hue=gr.themes.colors.slate,
        font=["Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["Cascadia Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_primary_border_color="*primary_700",
        button_primary_border_color_dark="*primary_700",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_cancel_background_fill="white",
        button_cancel_background_fill_hover="*neutral_100",
        button_cancel_background_fill_dark="*neutral_800",
        button_cancel_background_fill_hover_dark="*neutral_700",
        button_cancel_border_color="*neutral_400",
        button_cancel_border_color_dark="*neutral_500",
        button_cancel_text_color="*neutral_800",
        button_cancel_text_color_dark="*neutral_100",
        color_accent="*primary_700",
        button_large_text_size="*text_md",
        button_border_width="1px",
        button_border_width_dark="1px",
        block_shadow="none",
        block_shadow_dark="none",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_label_text_weight="600",
        block_title_text_weight="600",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )


def _scaled(css: str) -> str:
    """Sizes of text follow the visitor's choice: see page_comfort.py."""
    return re.sub(r"font-size: (\d+)px", r"font-size: calc(\1px * var(--gw-scale, 1))", css)


_COLOURS = """
:root {
  --gw-soft: #64748b; --gw-line: #e2e8f0; --gw-good: #0f766e;
  --gw-bad: #b42318; --gw-bad-back: #fef3f2; --gw-note: #8a5a00; --gw-note-back: #fffaeb;
}
.dark {
  --gw-soft: #94a3b8; --gw-line: #334155; --gw-good: #5eead4;
  --gw-bad: #fda29b; --gw-bad-back: #3b1512; --gw-note: #fcd34d; --gw-note-back: #33290b;
}
input.subdued { color: var(--gw-soft) !important; }
"""

_FRAME = """
.dark { --color-accent: var(--primary-400); }
.gradio-container { max-width: none !important; padding: 0 !important; }
.gradio-container > .main {
  width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; padding: 12px 20px 20px !important;
}
.wrap.min-h-screen { background: none !important; } /* the login page of 6 */
footer { display: none !important; }
.html-container { padding: 0 !important; }
.tabitem { border: none !important; padding: 8px 0 0 !important; }
#gw-title { font-size: 17px; font-weight: 650; letter-spacing: -.01em; margin: 0; padding: 2px 0; }
#gw-head-row { align-items: center !important; flex-wrap: nowrap !important; gap: 12px !important; }
#gw-head-row > :first-child { flex: 1 1 auto !important; min-width: 0 !important; }
#gw-free { flex: 0 0 auto !important; width: auto !important; margin: -3px 0; }
#gw-title span { color: var(--gw-soft); font-weight: 400; font-size: 14px; margin-left: 8px; letter-spacing: 0; }
"""

_COMFORT = """ /* page_comfort.py */
:root {
  --text-xxs: calc(9px * var(--gw-scale, 1)) !important; --text-xs: calc(10px * var(--gw-scale, 1)) !important;
  --text-sm: calc(12px * var(--gw-scale, 1)) !important; --text-md: calc(14px * var(--gw-scale, 1)) !important;
  --text-lg: calc(16px * var(--gw-scale, 1)) !important; --text-xl: calc(22px * var(--gw-scale, 1)) !important;
}
#gw-comfort-place { flex: 0 0 auto !important; width: auto !important; min-width: 0 !important; overflow: visible !important; }
#gw-comfort { position: relative; }
#gw-comfort-place > div, #gw-comfort-place .prose { display: flex; gap: 8px; align-items: stretch; }
#gw-keys-button { border: 1px solid var(--gw-line) !important; border-radius: 6px !important; padding: 3px 11px !important;
  font-size: 13px !important; font-weight: 600 !important; background: var(--button-secondary-background-fill) !important; }
#gw-comfort summary {
  list-style: none; cursor: pointer; padding: 3px 10px; border: 1px solid var(--gw-line); border-radius: 6px;
  font-size: 13px; font-weight: 600; background: var(--button-secondary-background-fill); color: var(--body-text-color);
}
#gw-comfort summary::-webkit-details-marker { display: none; }
#gw-comfort > div {
  position: absolute; right: 0; top: calc(100% + 6px); z-index: 50; width: 210px; padding: 12px; display: grid; gap: 10px;
  background: var(--block-background-fill); border: 1px solid var(--gw-line); border-radius: 8px;
  box-shadow: 0 6px 24px rgb(0 0 0 / .18);
}
#gw-comfort label { display: grid; gap: 4px; font-size: 13px; color: var(--body-text-color); }
#gw-comfort select {
  font-size: 14px; padding: 6px 8px; border: 1px solid var(--gw-line); border-radius: 6px;
  background: var(--input-background-fill); color: var(--body-text-color);
}
#gw-lost {
  position: fixed; inset: 0 0 auto 0; z-index: 1000; padding: 10px 16px; text-align: center; font-size: 14px;
  font-family: var(--font, sans-serif); color: #fff; background: #b42318;
}
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 2px; }
@media (pointer: coarse), (max-width: 640px) { /* what a finger must hit */
  #gw-tabs [role=tab], #gw-comfort summary, .gw-buttons button, #gw-head-row button, .gw-action, .gw-panel button.label-wrap,
  .gw-group > button, #gw-tabs .block > button.label-wrap { min-height: 44px !important; }
  #gw-comfort summary { min-width: 44px; display: grid; place-items: center; }
  button.label-wrap { align-items: center; }
  #gw-comfort select, #gw-tabs .block > label textarea, #gw-tabs .block > label input:not([role], [type=checkbox], [type=radio]) {
    min-height: 44px;
  }
  #gw-tabs button.sm { min-height: 44px; }
  #gw-api-code .icon-button { min-width: 44px; min-height: 44px; justify-content: center; }
  .gw-fields .form > .block { flex: 1 1 100% !important; }
  #gw-tabs .tab-like-container { height: 46px !important; }
  #gw-tabs .tab-like-container > * { height: 100% !important; min-width: 44px !important; }
  #gw-tabs input[type=range] { box-sizing: border-box; height: 44px; padding-block: 18px; background-clip: content-box; }
}
"""

_WORDS = """ /* html_snippets.py */
.gw-hidden { display: none !important; }
.gw-quiet, .gw-good, .gw-bad, .gw-working p { margin: 4px 0; line-height: 1.5; overflow-wrap: anywhere; }
.gw-quiet, .gw-working p.gw-quiet { color: var(--gw-soft); font-size: 14px; } .gw-good { color: var(--gw-good); }
.gw-bad, .gw-note, .gw-banner { border-left: 3px solid; border-radius: 4px; padding: 8px 12px; overflow-wrap: anywhere; }
.gw-bad { color: var(--gw-bad); background: var(--gw-bad-back); }
.gw-note, .gw-banner { color: var(--gw-note); background: var(--gw-note-back); margin: 6px 0; line-height: 1.45; }
.gw-bar { height: 8px; border-radius: 4px; background: var(--gw-line); overflow: hidden; margin: 6px 0; }
.gw-bar i { display: block; height: 100%; border-radius: 4px; background: var(--primary-600); transition: width .3s; }
.gw-bar i.gw-some { width: 30%; animation: gw-slide 1.4s ease-in-out infinite alternate; }
@keyframes gw-slide { from { margin-left: 0 } to { margin-left: 70% } }
@media (prefers-reduced-motion: reduce) { .gw-bar i.gw-some { animation: none; width: 100%; opacity: .5 } }
.gw-option { min-width: min(200px, 100%) !important; }  /* Gradio gives a checkbox none */
.gw-facts { display: grid; grid-template-columns: minmax(96px, max-content) 1fr; gap: 5px 18px; margin: 0; line-height: 1.45; }
.gw-loaders { width: 100%; border-collapse: collapse; line-height: 1.45; margin: 0 !important; border: none !important; }
.gw-loaders th, .gw-loaders td {
  text-align: left; vertical-align: top; padding: 7px 14px 7px 0 !important; border: 0 solid var(--gw-line) !important;
}
.gw-loaders tbody, .gw-loaders tr { border: none !important; background: none !important; }
.gw-loaders tr + tr > * { border-top-width: 1px !important; }
.gw-loaders th { font-weight: 600; white-space: nowrap; }
.gw-loaders td:last-child { overflow-wrap: anywhere; padding-right: 0 !important; }
.gw-loaders span { color: var(--gw-soft); font-size: 14px; }
.gw-loaders .gw-no > * { color: var(--gw-soft) !important; }
.gw-loaders .gw-taken td:nth-child(2) { color: var(--gw-good); font-weight: 600; }
.gw-facts dt { color: var(--gw-soft); } .gw-facts dd { margin: 0; overflow-wrap: anywhere; }
"""

_MODEL = """
.gw-columns { align-items: flex-start !important; }
.gw-panel {
  background: var(--block-background-fill); border: 1px solid var(--gw-line) !important; border-radius: 8px;
  padding: 14px 16px !important; gap: 10px !important; flex-grow: 0 !important;
}
.gw-panel .form { border: none !important; background: none !important; box-shadow: none !important; }
.gw-panel .block:not(.gw-hidden) { border: none !important; background: none; padding: 0 !important; }
.gw-panel .block { overflow: visible !important; }
.gw-panel input, .gw-panel textarea { text-overflow: ellipsis; }
.gw-buttons { gap: 8px !important; }
.gw-buttons button { flex: 0 1 auto; }
#gw-choose-row { flex-wrap: nowrap !important; align-items: flex-end !important; gap: 8px !important; }
#gw-choose-row > :first-child { flex: 1 1 0 !important; min-width: 0 !important; }
#gw-refresh { flex: 0 0 auto !important; width: auto !important; min-height: 38px; }
#gw-reload-settings { flex: 0 1 auto !important; width: auto !important; } #gw-reload { min-width: 150px !important; }
#gw-load-stop, #gw-back, #gw-report-copy { align-self: flex-start; width: auto !important; flex-grow: 0 !important; }
:is(#gw-models, #gw-compare-models, #gw-quantize-source, #gw-train-model, #gw-export-model, #gw-export-adapter) input {
  padding-right: 28px;
}
"""

_API = """ /* api_box.py */
#gw-api-head a { color: var(--gw-good) !important; margin: 0 !important; padding: 0 !important; }
#gw-api-code .cm-line span { color: inherit !important; } /* the editor's own colours are too pale on white */
#gw-api .form > #gw-api-naming { margin-top: 10px; }
"""

_FOLDED = """ /* accordions outside of the Chat tab: one frame is enough */
#gw-tabs .gr-accordion:not(#gw-house *) .form {
  border: none !important; background: none !important; box-shadow: none !important; gap: 14px !important;
}
#gw-tabs .gr-accordion:not(#gw-house *) .form > .block { padding: 0 !important; border: none !important; }
#gw-tabs .gr-accordion .block:has(> .html-container > .prose:empty) { position: absolute; } /* no gap for what says nothing */
"""

_TABLES = """ /* branch_box.py, library_box.py, download_box.py, quantize_tab.py */
.gw-wide { gap: 10px !important; }
.gw-wide > .form, .gw-wide .gw-fields .form { border: none !important; background: none !important; box-shadow: none !important; }
.gw-scroll { overflow-x: auto; border: 1px solid var(--gw-line); border-radius: 8px; margin: 6px 0; }
.gw-table, .gw-table tr, .gw-table thead, .gw-table tbody { border: none !important; }
.gw-table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4; margin: 0; }
.gw-table th, .gw-table td {
  padding: 7px 10px; text-align: left; vertical-align: top; border: none !important;
  border-top: 1px solid var(--gw-line) !important;
}
.gw-table th { border-top: none !important; color: var(--gw-soft); font-weight: 600; white-space: nowrap; }
#gw-quantize-layers .gw-table th { white-space: normal; min-width: 64px; }
.gw-table td.gw-name { font-weight: 600; min-width: 170px; overflow-wrap: anywhere; }
.gw-table td small { display: block; font-weight: 400; color: var(--gw-soft); overflow-wrap: normal; }
.gw-table td.gw-yes, .gw-table td.gw-partly, .gw-table td.gw-no { min-width: 84px; }
.gw-table tr.gw-best td { background: color-mix(in srgb, var(--primary-500) 12%, transparent); }
.gw-tag { color: var(--gw-good); font-weight: 400; font-size: 12px; margin-left: 4px; }
.gw-yes { color: var(--gw-good); } .gw-partly { color: var(--gw-note); } .gw-no { color: var(--gw-bad); }
.gw-link { color: var(--gw-good); text-decoration: underline; }
.gw-download { align-items: flex-start !important; border-top: 1px solid var(--gw-line); padding-top: 6px; }
.gw-download-text { flex: 1 1 100%; }
.gw-download button { flex: 0 0 auto !important; }
.gw-action {
  border: 1px solid var(--gw-line); border-radius: 6px; padding: 6px 12px; background: var(--block-background-fill);
  color: var(--body-text-color); font-size: 14px; font-weight: 600; cursor: pointer;
}
.gw-action:hover { border-color: var(--primary-600); }
#gw-branch-table details summary { cursor: pointer; color: var(--gw-soft); font-size: 14px; padding: 4px 0; }
"""

_PARAMETERS = """ /* parameters_tab.py, preset_box.py */
.gw-preset-row { align-items: flex-end !important; }
.gw-preset-row > :first-child { flex: 1 1 260px !important; }
.gw-preset-row > .gw-buttons { flex: 0 1 auto !important; width: auto !important; padding-bottom: 5px; }
.gw-panel .gw-fields, .gw-panel .gw-fields > .form { gap: 18px 30px !important; }
.gw-group { margin-left: 0 !important; margin-right: 0 !important; }
.gw-group .gw-fields .form { border: none !important; background: none !important; gap: 4px 10px !important; }
.gw-group .gw-fields .block { border: none !important; }
.gw-field .min_value, .gw-field .max_value { color: var(--gw-soft) !important; display: inline !important; } /* also on a phone */
.gw-field { border-radius: 6px; overflow: visible !important; }
.gw-panel #gw-preset-share { border-top: 1px solid var(--gw-line) !important; padding-top: 8px !important; border-radius: 0; }
"""

_NOTEBOOK = """ /* notebook_tab.py */
#gw-notebook-text textarea { line-height: 1.6; }
#gw-notebook-table td { white-space: nowrap; }
#gw-notebook-table th small { display: block; font-weight: 400; max-width: 240px; overflow: hidden; text-overflow: ellipsis; }
#gw-notebook-table td small { display: inline; margin-left: 6px; }
.gw-share { display: inline-block; width: 72px; height: 8px; border-radius: 4px; background: var(--gw-line); overflow: hidden; }
.gw-share i { display: block; height: 100%; background: var(--primary-600); }
.gw-soft { color: var(--gw-soft); }
"""

_TRAINING = """ /* train_box.py */
.gw-losses { display: block; width: 100%; height: 120px; color: var(--primary-600); border-bottom: 1px solid var(--gw-line); }
"""

_COMPARE = """ /* compare_tab.py */
#gw-compare-blind { margin-top: 10px; }
@media (max-width: 760px) { #gw-compare-answers { flex-direction: column; align-items: stretch !important; } }
.gw-compared { border: 1px solid var(--gw-line); border-radius: 8px; padding: 10px 14px; }
.gw-compared > div { white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 8px; }
.gw-compared h3 { margin: 0 0 6px; font-size: 15px; overflow-wrap: anywhere; }
"""

_CHARACTERS = """ /* character_parts.py */
#gw-character-editor .form { display: flex; flex-direction: column; gap: 10px !important; }
#gw-character-editor, #gw-persona-box { margin-top: 4px; }
"""

_MESSAGES = """ /* message_markdown.py, and what a Chatbot makes of code */
.gw-think { border-left: 3px solid var(--gw-line); padding: 0 0 0 12px; margin: 2px 0 12px; }
.gw-think, .gw-think p, .gw-think li { color: var(--gw-soft) !important; }
.gw-think > summary { cursor: pointer; font-size: 14px; padding: 3px 0; }
:is(.message, #gw-live) .code_wrap { max-width: 100%; }
:is(.message, #gw-live) .code_wrap pre { white-space: pre-wrap !important; overflow-wrap: anywhere; max-width: 100%; }
:is(.message, #gw-live) .code_wrap code { white-space: inherit !important; }
:is(.message, #gw-live) code[class*="language-"]::before { /* the language: the class without "language-" */
  content: attr(class); display: block; overflow: hidden; white-space: nowrap; text-indent: -9ch;
  color: var(--gw-soft); font-size: 12px; line-height: 1.2; padding-bottom: 6px; user-select: none;
}
:is(.message, #gw-live) .katex-display { overflow: auto hidden; max-height: 80vh; padding: 2px 0; }
"""

_PARTS = (
    _COLOURS, _FRAME, _COMFORT, _WORDS, _MODEL, _API, _FOLDED, _TABLES, _PARAMETERS, chat_style.CSS, _NOTEBOOK, _TRAINING,
    _COMPARE, _CHARACTERS, _MESSAGES,
)  # fmt: skip
CSS = _scaled("".join(_PARTS))
HOST_CSS = _COLOURS + _WORDS + _MODEL + _TABLES  # for a tab in another program's page: changes only our own classes
