"""How the Chat tab looks: the list, the messages, and the box. It changes only what is inside of #gw-house."""

from urllib.parse import quote

from . import chat_files

# 24 x 24, drawn with lines
_ICONS = {
    "copy": "M9 9h11v11H9zM5 15H4V4h11v1",
    "edit": "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
    "again": "M20 11A8 8 0 1 0 18 17M20 5v6h-6",
    "more": "M5 5l7 7-7 7M13 5l7 7-7 7",
    "branch": "M6 4v10M6 14a3 3 0 1 0 .01 0M18 4a3 3 0 1 0 .01 0M18 10c0 4-6 3-11 6",
    "remove": "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
    "likely": "M5 20v-6M10 20V9M15 20V4M20 20v-9",
    "back": "M15 5l-7 7 7 7",
    "on": "M9 5l7 7-7 7",
    "list": "M4 6h16M4 12h16M4 18h16",
    "clip": "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 5 5l-8.500 8.500a1.700 1.700 0 0 1-2.500-2.500L14 8",
}


def _icon(path: str) -> str:
    svg = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='black' stroke-width='2' "
        f"stroke-linecap='round' stroke-linejoin='round'><path d='{path}'/></svg>"
    )
    return f'url("data:image/svg+xml,{quote(svg)}")'


_ICON_RULES = "".join(
    f".gw-icon-{name}::before {{ -webkit-mask-image: {_icon(path)}; mask-image: {_icon(path)}; }}\n"
    for name, path in _ICONS.items()
)

_BUTTONS = """
button.gw-act, .gw-menu summary {
  background: none; border: none; cursor: pointer; color: inherit; font: inherit; padding: 4px 6px; border-radius: 6px;
  line-height: 1.3; text-align: left;
}
button.gw-act:hover, .gw-menu summary:hover { background: var(--gw-hover); }
button.gw-act:focus-visible, .gw-menu summary:focus-visible { outline: 2px solid var(--primary-500); outline-offset: 1px; }
button.gw-icon { font-size: 0 !important; padding: 5px; color: var(--gw-soft); display: inline-flex; }
button.gw-icon:hover { color: var(--body-text-color); }
button.gw-icon::before {
  content: ""; width: 16px; height: 16px; background: currentColor; -webkit-mask-size: contain; mask-size: contain;
  -webkit-mask-repeat: no-repeat; mask-repeat: no-repeat;
}
"""

_LIST = """
:root { --gw-hover: rgb(100 116 139 / .14); --gw-chosen: rgb(13 148 136 / .14); --gw-own: #eef2f6; }
.dark { --gw-hover: rgb(148 163 184 / .16); --gw-chosen: rgb(45 212 191 / .16); --gw-own: #1e293b; }
#gw-house { flex-wrap: nowrap !important; gap: 18px !important; align-items: stretch !important; height: calc(100dvh - 133px);
  min-height: 420px; }
.gradio-container:has(#gw-banner .gw-banner) #gw-house { height: calc(100dvh - 199px); }
#gw-side { flex: 0 0 252px !important; width: 252px; gap: 8px !important; flex-wrap: nowrap !important; min-height: 0; }
#gw-side > * { flex: 0 0 auto !important; }
#gw-side > #gw-list { flex: 1 1 auto !important; min-height: 0; overflow-y: auto !important; overflow-x: hidden !important; }
#gw-side .form, #gw-ask .form { border: none !important; background: none !important; box-shadow: none !important; }
#gw-new { min-height: 38px; }
.gw-chats { display: flex; flex-direction: column; gap: 1px; padding-bottom: 90px; }
.gw-group { color: var(--gw-soft); font-size: 12px; font-weight: 600; margin: 10px 8px 3px; }
.gw-item { display: flex; flex-wrap: wrap; align-items: center; border-radius: 8px; position: relative; padding-right: 30px; }
.gw-item:hover { background: var(--gw-hover); }
.gw-item.gw-now { background: var(--gw-chosen); }
.gw-item .gw-open {
  flex: 1 1 0; min-width: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; padding: 8px 4px 8px 10px;
  font-size: 14px; background: none !important;
}
.gw-item small { color: var(--gw-soft); font-size: 11px; border: 1px solid var(--gw-line); border-radius: 9px; padding: 0 6px;
  margin: 0 0 6px 10px; max-width: 90%; overflow: hidden; text-overflow: ellipsis; }
.gw-item small + small { margin-left: 4px; }
.gw-item:has(small) .gw-open { flex-basis: 100%; }
.gw-dot { width: 8px; height: 8px; border-radius: 50%; background: var(--primary-500);
  animation: gw-beat 1.2s infinite alternate; }
@keyframes gw-beat { to { opacity: .3 } }
.gw-item > .gw-menu { position: absolute; right: 2px; top: 3px; }
.gw-menu { position: relative; }
.gw-menu summary { list-style: none; color: var(--gw-soft); padding: 3px 7px; }
.gw-menu summary::-webkit-details-marker { display: none; }
.gw-item > .gw-menu summary { opacity: 0; }
.gw-item:hover > .gw-menu summary, .gw-item:focus-within > .gw-menu summary, .gw-menu[open] summary,
  .gw-now > .gw-menu summary {
  opacity: 1 !important;
}
.gw-menu > div {
  position: absolute; right: 0; top: 100%; z-index: 40; min-width: 200px; display: flex; flex-direction: column; padding: 5px;
  background: var(--background-fill-primary); border: 1px solid var(--gw-line); border-radius: 8px;
  box-shadow: 0 8px 24px rgb(0 0 0 / .18);
}
.gw-menu.gw-up > div { top: auto; bottom: 100%; left: 0; right: auto; }
.gw-menu > div button { padding: 7px 10px !important; font-size: 13px !important; }
.gw-item > .gw-menu > div { width: 226px; }
.gw-danger { color: var(--gw-bad) !important; }
.gw-rename { flex: 1 1 auto; min-width: 0; width: 100%; margin: 3px; padding: 5px 8px; border: 1px solid var(--primary-500);
  border-radius: 6px; background: var(--input-background-fill); color: inherit; font-size: 14px; }
.gw-undelete { display: flex; gap: 6px; align-items: center; font-size: 13px; margin: 4px 0; padding: 6px 8px;
  border-radius: 8px;
  background: var(--gw-hover); }
.gw-undelete span { flex: 1 1 0; overflow-wrap: anywhere; }
.gw-undelete button { color: var(--gw-good) !important; font-weight: 600 !important; }
.gw-tags, .gw-chips { display: flex; flex-wrap: wrap; gap: 5px; margin: 4px 0; }
.gw-chip { border: 1px solid var(--gw-line) !important; border-radius: 12px !important; padding: 1px 9px !important;
  font-size: 12px !important; color: var(--gw-soft); background: var(--background-fill-primary); }
.gw-tags .gw-chip, .gw-chips .gw-chip { margin: 0 !important; line-height: 1.5 !important; display: inline-flex;
  align-items: center; }
.gw-chip[aria-pressed=true] { background: var(--gw-chosen) !important; color: var(--gw-good); }
.gw-side-foot summary { color: var(--gw-soft); font-size: 13px; }
#gw-shade { display: none; }
#gw-toast { position: fixed; left: 50%; bottom: 90px; transform: translateX(-50%); background: #0f172a; color: white;
  padding: 8px 14px; border-radius: 8px; font-size: 14px; opacity: 0; transition: opacity .2s; pointer-events: none;
  z-index: 90; }
#gw-toast.gw-on { opacity: .95; }
#gw-lost { position: fixed; left: 0; right: 0; top: 0; background: #b42318; color: white; text-align: center; padding: 8px;
  z-index: 99; }
"""

_TALK = """
#gw-main { flex: 1 1 0 !important; min-width: 0 !important; min-height: 0; gap: 6px !important; flex-wrap: nowrap !important;
  overflow-y: auto; }
#gw-main > * { flex: 0 0 auto; }
#gw-main > #gw-chat { flex: 1 1 auto !important; min-height: 170px; overflow: hidden auto !important; gap: 0 !important;
  flex-wrap: nowrap !important; scrollbar-gutter: stable; overscroll-behavior: contain; }
#gw-chat > * { flex: 0 0 auto; }
#gw-chat-head { flex-wrap: nowrap !important; gap: 6px !important; align-items: center !important; }
#gw-chat-head > #gw-head { flex: 1 1 0 !important; min-width: 0; }
#gw-drawer { display: none; flex: 0 0 auto !important; width: auto !important; min-width: 0 !important; }
.gw-who { line-height: 1.5; overflow-wrap: anywhere; }
@media (min-width: 761px) { .gw-who { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; } }
.gw-who span { color: var(--gw-soft); font-size: 14px; margin-left: 6px; }
#gw-past { height: auto !important; min-height: 0 !important; max-height: none !important; border: none !important;
  background: none !important; overflow: visible !important; }
#gw-past .wrapper, #gw-past .bubble-wrap, #gw-past .wrap { height: auto !important; max-height: none !important; min-height: 0;
  overflow: visible !important; background: none !important; }
#gw-past .bubble-wrap { padding: 0 !important; }
#gw-past .icon-button-wrapper.top-panel, #gw-past .message-buttons, #gw-past .message-buttons-left,
#gw-past .message-buttons-right { display: none !important; }
#gw-past .message-wrap { padding: 0 4px !important; gap: 4px !important; }
#gw-past .placeholder-content, #gw-past .placeholder { min-height: 26vh; color: var(--gw-soft); }
#gw-past :is(.placeholder-content, .placeholder) .prose { text-align: center; }
#gw-past .bot.message, #gw-past .bot { background: none !important; border: none !important; box-shadow: none !important;
  max-width: 100% !important; }
#gw-past .bot.message { width: 100% !important; padding: 0 !important; }
#gw-past .user.message { background: var(--gw-own) !important; border: none !important; border-radius: 14px !important;
  padding: 2px 14px !important; color: inherit !important; overflow: visible !important; margin-bottom: 26px !important; }
#gw-past .user .prose { padding-bottom: 0 !important; min-width: 0 !important; }
#gw-past .user :is(.message-content, .md, .prose, .panel-full-width, button, span) { overflow: visible !important; }
#gw-past .message-row.user-row, #gw-past .user-row { max-width: 86% !important; align-self: flex-end; }
#gw-past .message-row.bot-row, #gw-past .bot-row { max-width: 100% !important; width: 100%; }
#gw-past .message, #gw-live { overflow-wrap: anywhere; }
#gw-past :is(.message-row, .flex-wrap, .message, .message-content, .bot, .user, .prose, .md) { opacity: 1 !important; }
#gw-past .prose { display: block; position: relative; padding-bottom: 30px !important; min-width: 190px; }
#gw-past .prose, #gw-past .prose p, #gw-live, #gw-live .prose {
  font-size: 15px; line-height: 1.6; color: var(--body-text-color);
}
#gw-past .message-row { margin: 0 !important; padding: 0 !important; }
#gw-past .message-row .message, #gw-past .flex-wrap, #gw-past .message-content { margin: 0; }
#gw-live { padding: 0 4px 12px !important; }
#gw-live:empty { display: none; }
#gw-chat :is(th, td) { padding: 6px 12px !important; }
#gw-chat .prose table { margin: 10px 0 14px; }
#gw-chat .prose .code_wrap { margin: 8px 0 12px; }
#gw-chat .prose ul { list-style: disc; } #gw-chat .prose ul ul { list-style: circle; }
#gw-chat table, #gw-chat th, #gw-chat td { border-color: var(--gw-line) !important; }
.dark .token.comment { color: #94a3b8 !important; }
#gw-past .gw-below { position: absolute; left: 0; right: 0; bottom: 0; display: flex; align-items: center; gap: 10px;
  height: 28px;
  margin: 0; min-width: 0; }
#gw-past .user .prose > .gw-below ~ * { margin-top: 6px; }
#gw-past .user .prose > :last-child { margin-bottom: 6px; }
#gw-past .gw-of-user { justify-content: flex-end; left: auto; right: -12px; bottom: -31px; }
#gw-past .gw-acts { display: flex; align-items: center; flex: 0 0 auto; margin-left: -5px; }
#gw-past .gw-versions { display: inline-flex; align-items: center; font-size: 12px; color: var(--gw-soft); }
#gw-past .gw-figures { color: color-mix(in srgb, var(--gw-soft) 40%, var(--body-text-color)); font-size: 12px;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  flex: 1 1 0; min-width: 0; }
@media (hover: hover) {
  #gw-past .gw-acts > button { opacity: .55; transition: opacity .12s; }
  #gw-past .gw-of-user .gw-acts > button { opacity: 0; }
  #gw-past .message:hover .gw-acts > button, #gw-past .message:focus-within .gw-acts > button,
  #gw-past .gw-last .gw-acts > button {
    opacity: 1;
  }
}
.gw-earlier { color: var(--gw-good) !important; font-size: 14px !important; }
#gw-line { min-height: 4px; }
.gw-spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
#gw-message textarea { resize: none; }
#gw-setting:has(> button.open) { padding-top: 0 !important; }
#gw-setting > button.open { position: sticky; top: 0; z-index: 10; background: var(--block-background-fill); padding: 10px 0; }
#gw-setting .form { border: none !important; background: none !important; box-shadow: none !important; gap: 14px !important; }
#gw-setting .form > .block { border: none !important; padding: 0 !important; }
#gw-ask { align-items: flex-end !important; }
#gw-ask button { flex-grow: 0 !important; min-height: 42px; }
#gw-more { gap: 2px !important; align-items: center !important; flex-wrap: wrap !important; }
#gw-more > * { flex: 0 0 auto !important; width: auto !important; min-width: 0 !important; }
#gw-more > button { background: none !important; border: none !important; box-shadow: none !important;
  font-weight: 400 !important;
  color: var(--gw-soft) !important; padding: 4px 9px !important; font-size: 13px !important; }
#gw-more > button:hover { background: var(--gw-hover) !important; color: var(--body-text-color) !important; }
#gw-more > #gw-meter { margin-left: auto; }
#gw-more > #gw-undo { color: var(--gw-good) !important; }
#gw-meter > div, #gw-meter .prose { display: flex; flex-wrap: wrap; justify-content: flex-end; align-items: center; }
button.gw-meter { display: inline-flex; align-items: center; gap: 8px; font-size: 13px; color: var(--gw-soft); }
button.gw-meter .gw-wide { color: inherit !important; margin-left: -4px; }
.gw-meter-bar { display: inline-block; width: 70px; height: 6px; border-radius: 3px; background: var(--gw-line);
  overflow: hidden; }
.gw-meter-bar i { display: block; height: 100%; background: var(--primary-600); }
.gw-nearly .gw-meter-bar i { background: #d97706; } .gw-full .gw-meter-bar i { background: #dc2626; }
.gw-meter-words { font-size: 13px; color: var(--gw-note); }
.gw-prompt { border: 1px solid var(--gw-line); border-radius: 8px; margin-top: 6px; }
.gw-prompt-head { display: flex; justify-content: space-between; align-items: center; padding: 6px 10px; }
.gw-prompt pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 40vh; overflow-y: auto; margin: 0; padding: 10px;
  font-size: 13px; border-top: 1px solid var(--gw-line); }
.gw-prompt > p { margin: 0; padding: 0 10px 8px; }
.gw-tokens { padding: 10px; border-top: 1px solid var(--gw-line); max-height: 24vh; overflow-y: auto; font-size: 14px;
  line-height: 1.9; }
button.gw-token { font: inherit; white-space: pre-wrap; border: none; cursor: pointer; padding: 2px 0; border-radius: 3px;
  color: inherit; background: rgb(217 119 6 / calc(var(--gw-odd) * .45)); }
button.gw-token:hover, button.gw-token[aria-pressed=true] { outline: 2px solid var(--primary-500); }
.gw-others:not(:empty) { padding: 8px 10px; border-top: 1px solid var(--gw-line); }
.gw-others table { border-collapse: collapse; font-size: 14px; margin: 0 !important; }
.gw-others :is(table, tbody, tr, td) { border: none !important; }
.gw-others td { padding: 3px 14px 3px 0; white-space: nowrap; }
.gw-others .gw-taken { font-weight: 600; }
.gw-others button { color: var(--gw-good) !important; }
.gw-own { color: var(--gw-note) !important; font-size: 13px !important; margin-right: 8px;
  text-decoration: underline dotted !important; }
#gw-keys { border: 1px solid var(--gw-line); border-radius: 12px; padding: 20px 24px; max-width: min(92vw, 520px); margin: auto;
  background: var(--background-fill-primary); color: var(--body-text-color); box-shadow: 0 16px 48px rgb(0 0 0 / .3); }
#gw-keys::backdrop { background: rgb(0 0 0 / .4); }
#gw-keys h2 { margin: 0 0 12px; font-size: 17px; font-weight: 650; }
#gw-keys dl { display: grid; grid-template-columns: auto 1fr; gap: 8px 20px; margin: 0 0 16px; font-size: 14px; }
#gw-keys dt { font-weight: 600; } #gw-keys dd { margin: 0; color: var(--body-text-color); }
#gw-keys button { border: 1px solid var(--gw-line); border-radius: 6px; padding: 6px 16px; min-height: 36px; cursor: pointer;
  background: none; color: inherit; font: inherit; }
.gw-prompt mark { background: var(--gw-chosen); color: var(--gw-good); border-radius: 3px; padding: 0 2px; }
#gw-edit { border: 1px solid var(--primary-500); border-radius: 8px; padding: 10px 12px !important; gap: 8px !important; }
#gw-edit .form, #gw-edit .block { border: none !important; background: none !important; padding: 0 !important;
  overflow: visible !important; }
#gw-files:not(:has(.gw-chip)) { display: none; }

@media (min-width: 1001px) { /* beside the conversation */
  #gw-main:has(> #gw-setting > button.open) { position: relative; padding-right: 364px !important; }
  #gw-main > #gw-setting:has(> button.open) { position: absolute; inset: 0 0 0 auto; width: 348px; overflow-y: auto !important; }
}
@media (max-width: 1000px) {
  #gw-main > #gw-setting:has(> button.open) { max-height: 40%; overflow-y: auto !important; }
}
@media (max-width: 760px) {
  .gradio-container > .main { padding: 8px 12px 12px !important; }
  #gw-title span { display: none; }
  #gw-house { height: calc(100dvh - 148px); }
  .gradio-container:has(#gw-banner .gw-banner) #gw-house { height: calc(100dvh - 210px); }
  #gw-head .gw-who { display: flex; flex-direction: column; line-height: 1.3; }
  #gw-head .gw-who > * { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; margin-left: 0; }
  #gw-head .gw-who span { font-size: 12px; }
  #gw-more > #gw-regenerate, #gw-meter .gw-meter-bar, #gw-meter .gw-wide { display: none; } /* each answer has its own */
  #gw-keys-button { display: none !important; }
  #gw-edit .gw-buttons > button { flex: 1 1 auto !important; min-width: 0 !important; }
  #gw-more > button, #gw-more > #gw-meter button { padding: 4px 5px !important; }
  .gw-others td { white-space: normal; }
  #gw-drawer { display: block; }
  #gw-drawer button::before { width: 22px; height: 22px; }
  #gw-side { position: fixed !important; z-index: 60; left: 0; top: 0; bottom: 0; width: min(84vw, 320px) !important;
    background: var(--body-background-fill); padding: 12px !important; transform: translateX(-105%); transition: transform .18s;
    visibility: hidden; box-shadow: 0 0 30px rgb(0 0 0 / .3); }
  #gw-house.gw-drawer-open #gw-side { transform: none; visibility: visible; }
  #gw-house.gw-drawer-open #gw-shade { display: block; position: fixed; inset: 0; z-index: 50; background: rgb(0 0 0 / .45); }
  .gw-item > .gw-menu summary { opacity: 1; padding: 8px 11px; }
  .gw-item .gw-open { padding: 12px 4px 12px 10px; }
  .gw-item { padding-right: 42px; }
  #gw-ask { flex-wrap: nowrap !important; gap: 8px !important; }
  #gw-ask > :first-child { flex: 1 1 0 !important; }
  #gw-ask button { flex: 0 0 76px !important; min-width: 76px !important; }
  #gw-more > button { padding: 4px 6px !important; }
  #gw-past .prose { padding-bottom: 70px !important; }
  #gw-past .user .prose { padding-bottom: 0 !important; }
  #gw-past .user.message { margin-bottom: 30px !important; }
  #gw-past .gw-below { flex-direction: column; align-items: flex-start; height: auto; gap: 0; }
  #gw-past .gw-of-user { align-items: flex-end; }
  #gw-past .gw-figures { flex: none; max-width: 100%; white-space: normal; display: -webkit-box; -webkit-line-clamp: 2;
    -webkit-box-orient: vertical; }
  button.gw-icon { padding: 7px; }
  .gw-menu > div button.gw-act, .gw-undelete button, button.gw-chip, .gw-earlier, button.gw-meter { min-height: 44px; }
  .gw-side-foot summary { min-height: 44px; display: flex; align-items: center; }
  #gw-drawer button, #gw-more .gw-icon-clip { min-width: 44px; min-height: 44px; align-items: center; justify-content: center; }
  #gw-list summary { min-width: 44px; min-height: 44px; display: flex; align-items: center; justify-content: center; }
  #gw-list .gw-open { min-height: 44px; }
  button[value="close-prompt"] { min-width: 44px; min-height: 44px; }
  #gw-send, #gw-stop { min-height: 44px !important; }
}
"""

CSS = _LIST + _BUTTONS + _ICON_RULES + _TALK + chat_files.CSS
