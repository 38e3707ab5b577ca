"""The characters, personas and system prompts of a login, and which of them belong to the conversation that is shown.

Files come through the page's script as base64: the page takes no uploads.
"""

import base64
import binascii
import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import gradio as gr

from ..core.character import MOST_NAME, Character, Persona
from ..core.errors import GptqWebuiError
from ..engine import character_prompt
from ..engine.character_files import as_v2, read_character, read_lorebook
from ..engine.character_store import CharacterStore, Kind
from . import gradio_compat
from .character_parts import FIELDS, NOBODY, CharacterParts
from .chat_actions import ChatActions
from .chat_asked import Asked
from .chat_script import turn
from .chat_view import owner_of
from .html_snippets import bad, quiet
from .job_watcher import Pages, Updates

_BREAK = "\n***\n"  # between greetings in their box
# Chooses a file and passes on its name and content; nothing if the choice is cancelled.
_PICK = """(...values) => new Promise((done) => {
  const input = document.createElement('input');
  const end = (text) => { input.remove(); done([text, ...values.slice(1)]); };
  input.type = 'file'; input.accept = '.png,.json,.yaml,.yml,.charx'; input.className = 'gw-character-file'; input.hidden = true;
  input.oncancel = () => end('');
  input.onchange = () => {
    const file = input.files[0];
    if (!file) return end('');
    if (file.size > 20000000) return end(JSON.stringify([file.name, '', 'large']));
    const reader = new FileReader();
    reader.onload = () => end(JSON.stringify([file.name, String(reader.result).split(',')[1] || '']));
    reader.onerror = () => end('');
    reader.readAsDataURL(file);
  };
  document.body.append(input); input.click();
})"""


class CharacterBox:
    """Wired by `wire`."""

    def __init__(self, actions: ChatActions, kept: CharacterStore, parts: CharacterParts) -> None:
        self._actions, self._kept, self._chats, self._at = actions, kept, actions.chats, parts
        self._parts = actions.view.parts
        self._listed_on: Pages[str] = Pages()  # the conversation whose lists an act has drawn on a page

    def wire(self, inputs: Sequence[Any], answered: Callable[[Any], None]) -> None:
        """`inputs`: those of the Chat tab's handlers; `answered` ends the turn of an event."""

        def on(trigger: Callable[..., Any], work: Callable[..., Updates], mine: Sequence[Any] = (), pick: str = "") -> None:
            def handle(request: gr.Request, *values: Any) -> Updates:
                texts = [each or "" if not isinstance(each, list) else "" for each in values[: len(mine)]]

                def run(asked: Asked, _given: Any) -> Updates:
                    try:
                        return work(asked, *map(str, texts))
                    except GptqWebuiError as error:
                        return {self._at.note: bad(str(error))}

                return self._actions.handler(run)(request, *values[len(mine) :])

            outputs = [*self._actions.view.outputs, *self._at.own]
            play = turn("play", len(mine))
            script = f"async (...given) => ({play})(...await ({pick})(...given))" if pick else play
            answered(trigger(handle, [*mine, *inputs], outputs, js=script, **gradio_compat.NOW))

        cast = [self._at.choice, self._at.persona]
        on(self._at.choice.input, self._choose, cast)
        on(self._at.persona.input, self._choose, cast)
        on(self._at.prompt.input, self._use_prompt, [self._at.prompt])
        on(self._at.bring.click, self._import, [self._at.file, self._at.persona], pick=_PICK)
        on(self._at.new.click, self._new)
        on(self._at.change.click, self._edit, [self._at.choice])
        on(self._at.export.click, self._export, [self._at.choice])
        on(self._at.delete.click, self._delete, [self._at.choice])
        on(self._at.back.click, self._undelete, [self._at.gone])
        on(self._at.save.click, self._save, [self._at.edited, self._at.persona, *self._at.boxes])
        on(self._at.lore.click, self._lore, [self._at.file, self._at.edited], pick=_PICK)
        on(self._at.close.click, lambda asked: {self._at.editor: gr.update(visible=False), self._at.note: ""})
        on(self._at.keep_persona.click, self._save_persona, [self._at.own_name, self._at.own_words])
        on(self._at.drop_persona.click, self._delete_persona, [self._at.persona])
        on(self._at.keep_prompt.click, self._save_prompt, [self._at.prompt_name])
        on(self._at.drop_prompt.click, self._delete_prompt, [self._at.prompt])
        lists = [self._at.choice, self._at.persona, self._at.prompt, self._at.note]
        self._parts.shown.change(self.show, self._parts.shown, lists, **gradio_compat.SHOW)
        gradio_compat.root().load(self.show, self._parts.shown, lists, **gradio_compat.SHOW)

    def show(self, id: str, request: gr.Request) -> Updates:
        """The lists, and what the conversation has of them, unless the act that opened it has drawn them, with its note."""
        if self._listed_on.pop(request) == (id or ""):
            return {self._at.note: gr.update()}
        try:
            return self._lists(owner_of(request), id or "")
        except GptqWebuiError as error:
            return {self._at.note: bad(str(error))}

    def _lists(self, owner: str, id: str) -> Updates:
        character, persona = character_prompt.read_cast(self._chats.store.get(owner, id).character if id else {})
        names, personas = self._kept.names(owner, "character"), self._kept.names(owner, "persona")
        here, me = character.name if character is not None else NOBODY, persona.name
        names += [here] if here and here not in names else []  # deleted, or of another login: the conversation still has it
        personas += [me] if me and me not in personas else []
        words = quiet(character.notes[:500]) if character is not None else ""
        return {
            self._at.choice: gr.update(choices=[("Nobody", NOBODY), *((each, each) for each in names)], value=here),
            self._at.persona: gr.update(choices=[("Just me", NOBODY), *((each, each) for each in personas)], value=me),
            self._at.prompt: gr.update(choices=self._kept.names(owner, "prompt"), value=None),
            self._at.note: words,
        }

    # --- of the conversation -----------------------------------------------------------------------

    def _choose(self, asked: Asked, name: str, me: str) -> Updates:
        owner = asked.owner
        present, self_now = character_prompt.read_cast(self._chats.store.get(owner, asked.id).character if asked.id else {})
        if present is not None and present.name == name:
            character: Character | None = present
        else:
            character = self._kept.character(owner, name) if name else None
        if me not in self._kept.names(owner, "persona"):
            persona = self_now if me == self_now.name else Persona()
        else:
            persona = self._kept.persona(owner, me)
        return self._play(asked, character, persona)

    def _play(self, asked: Asked, character: Character | None, persona: Persona) -> Updates:
        """The conversation has these from now on. One in which nobody has spoken begins with the greeting."""
        owner, store = asked.owner, self._chats.store
        value = character_prompt.cast(character, persona)
        words = ""
        if not asked.id and not value:
            return self._lists(owner, "")
        id = asked.id or store.create(owner, **asked.settings).id
        with self._chats.stopped(owner, id):
            path = store.path(owner, id)
            store.set(owner, id, character=value)
            if all(each.details.get("greeting") for each in path):
                if path:
                    store.clear(owner, id)
                character_prompt.greet(store, owner, id)
            elif character is not None:
                words = f"{character.name} answers from now on. Press New conversation first to begin with the greeting."
        if id != asked.id:
            self._listed_on.set(asked.request, id)
        shown = self._actions.view.show(asked.request, id, asked.known, asked.query, opened=True)
        return shown | self._lists(owner, id) | ({self._at.note: quiet(words)} if words else {})

    def _use_prompt(self, asked: Asked, name: str) -> Updates:
        text = self._kept.prompt(asked.owner, name)
        if asked.id:
            self._chats.store.set(asked.owner, asked.id, system=text)
        return {self._parts.system: text, self._at.prompt_name: name}

    # --- the library -------------------------------------------------------------------------------

    def _import(self, asked: Asked, file: str, me: str) -> Updates:
        if (given := _file(file)) is None:
            return {self._at.note: gr.update()}
        found = read_character(*given)
        name = self._kept.free_name(asked.owner, "character", found.name)
        character = Character.read(found.as_json() | {"name": name[:MOST_NAME]})
        self._kept.save_character(asked.owner, character)
        played = self._choose(asked, character.name, me)
        return played | self._form(character, visible=False)

    def _new(self, asked: Asked) -> Updates:
        return self._form(None) | {self._at.note: ""}

    def _edit(self, asked: Asked, name: str) -> Updates:
        if not name:
            return {self._at.note: quiet("Choose the character first.")}
        return self._form(self._kept.character(asked.owner, name)) | {self._at.note: ""}

    def _export(self, asked: Asked, name: str) -> Updates:
        if not name:
            return {self._at.note: quiet("Choose the character first.")}
        text = json.dumps(as_v2(self._kept.character(asked.owner, name)), ensure_ascii=False, indent=1)
        file = re.sub(r"[^\w-]+", "-", name).strip("-") or "character"
        return {self._parts.out: json.dumps({"download": [f"{file}.json", text], "new": secrets.token_hex(3)})}

    def _save(self, asked: Asked, edited: str, me: str, *texts: str) -> Updates:
        values: dict[str, Any] = {name: text for (name, _label, _lines), text in zip(FIELDS, texts, strict=True)}
        values["greetings"] = [each.strip() for each in values["greetings"].split(_BREAK) if each.strip()]
        before = self._kept.character(asked.owner, edited) if edited else None
        character = Character.read((before.as_json() if before is not None else {}) | values)
        self._kept.save_character(asked.owner, character)
        if before is not None and before.name != character.name:
            self._kept.delete(asked.owner, "character", before.name)
        persona = self._kept.persona(asked.owner, me) if me in self._kept.names(asked.owner, "persona") else Persona()
        return self._play(asked, character, persona) | {
            self._at.editor: gr.update(visible=False),
            self._at.note: quiet("Saved."),
        }

    def _lore(self, asked: Asked, file: str, edited: str) -> Updates:
        if (given := _file(file)) is None:
            return {self._at.note: gr.update()}
        if not edited:
            return {self._at.note: quiet("Save the character first, then edit it and import the lorebook.")}
        character = self._kept.character(asked.owner, edited)
        changed = Character.read(character.as_json() | {"book": asdict(read_lorebook(*given))})
        self._kept.save_character(asked.owner, changed)
        return {
            self._at.book: _about_book(changed),
            self._at.note: quiet("The lorebook is saved. Choose the character again to use it."),
        }

    def _delete(self, asked: Asked, name: str) -> Updates:
        return self._gone(asked, "character", name) | {self._at.editor: gr.update(visible=False)}

    def _delete_persona(self, asked: Asked, name: str) -> Updates:
        return self._gone(asked, "persona", name)

    def _delete_prompt(self, asked: Asked, name: str) -> Updates:
        return self._gone(asked, "prompt", name)

    def _gone(self, asked: Asked, kind: Kind, name: str) -> Updates:
        if not name:
            return {self._at.note: quiet("Choose from the list first.")}
        self._kept.delete(asked.owner, kind, name)
        return self._lists(asked.owner, asked.id) | {
            self._at.note: quiet(f"{name} was deleted. Conversations that have it keep it."),
            self._at.gone: json.dumps([kind, name]),
            self._at.back: gr.update(visible=True, value=f"Undo delete of {name[:30]}"),
        }

    def _undelete(self, asked: Asked, gone: str) -> Updates:
        try:
            kind, name = json.loads(gone)
        except (ValueError, TypeError, RecursionError):
            return {self._at.back: gr.update(visible=False)}
        self._kept.undelete(asked.owner, kind, str(name))
        words = quiet(f"{name} is back.")
        return self._lists(asked.owner, asked.id) | {
            self._at.gone: "",
            self._at.back: gr.update(visible=False),
            self._at.note: words,
        }

    def _save_persona(self, asked: Asked, name: str, words: str) -> Updates:
        persona = Persona.read({"name": name, "description": words})
        self._kept.save_persona(asked.owner, persona)
        character, _before = character_prompt.read_cast(
            self._chats.store.get(asked.owner, asked.id).character if asked.id else {}
        )
        return self._play(asked, character, persona) | {self._at.note: quiet("Saved.")}

    def _save_prompt(self, asked: Asked, name: str) -> Updates:
        if not asked.system.strip():
            return {self._at.note: quiet("The system prompt above is empty.")}
        self._kept.save_prompt(asked.owner, name, asked.system)
        return self._lists(asked.owner, asked.id) | {self._at.note: quiet("Saved.")}

    def _form(self, character: Character | None, *, visible: bool = True) -> Updates:
        values = character.as_json() if character is not None else {}
        values["greetings"] = _BREAK.join(values.get("greetings", ()))
        texts = {box: values.get(name, "") for box, (name, _label, _lines) in zip(self._at.boxes, FIELDS, strict=True)}
        about = {self._at.book: _about_book(character), self._at.edited: character.name if character is not None else ""}
        return {self._at.editor: gr.update(visible=visible), **texts, **about}


def _about_book(character: Character | None) -> str:
    entries = len(character.book.entries) if character is not None else 0
    return quiet(f"Lorebook: {entries:,} entries." if entries else "No lorebook.")


def _file(text: str) -> tuple[str, bytes] | None:
    """(name, content) of a file that the script passes on; None if none was chosen. Raises GptqWebuiError."""
    if not text:
        return None
    try:
        name, content, *rest = json.loads(text)
        if rest:
            raise GptqWebuiError("The file is larger than 20 MB. Choose a smaller one.")
        return str(name)[:200], base64.b64decode(content)
    except (ValueError, TypeError, binascii.Error, RecursionError):
        raise GptqWebuiError("The file did not arrive whole. Choose it again.") from None
