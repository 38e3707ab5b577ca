"""core/character.py, engine/character_*.py, engine/lorebook.py: reading characters, keeping them, what a model reads of them."""

import base64
import io
import json
import struct
import time
import zipfile
import zlib
from dataclasses import replace

import pytest

from gptq_webui.core.character import BadCharacter, Character, Lorebook, LoreEntry, Persona, with_names
from gptq_webui.core.chat import Message
from gptq_webui.core.chat_record import ChatInfo
from gptq_webui.engine import character_prompt, chat_prompt, lorebook
from gptq_webui.engine.character_files import as_v2, read_character, read_lorebook
from gptq_webui.engine.character_store import CharacterStore
from gptq_webui.engine.chat_store import ChatStore

V1 = {
    "name": "Mia", "description": "{{char}} is a baker.", "personality": "warm", "scenario": "A shop.",
    "first_mes": "Hello, {{user}}!", "mes_example": "<START>\n{{user}}: Bread?\n{{char}}: Fresh.",
}  # fmt: skip
BOOK = {
    "name": "town", "scan_depth": 2, "token_budget": 50, "extensions": {},
    "entries": [
        {"keys": ["oven"], "content": "The oven is hot.", "enabled": True, "insertion_order": 2, "position": "after_char"},
        {"keys": ["Bread"], "secondary_keys": ["rye"], "selective": True, "content": "Rye is dark.", "insertion_order": 1},
        {"keys": [], "constant": True, "content": "@@depth 4\nIt is morning.", "insertion_order": 0},
        {"keys": ["oven"], "content": "off", "enabled": False, "insertion_order": 0},
    ],
}  # fmt: skip
V2 = {
    "spec": "chara_card_v2", "spec_version": "2.0",
    "data": V1 | {
        "alternate_greetings": ["Good day."], "system_prompt": "{{original}} Play {{char}}.", "creator_notes": "by me",
        "post_history_instructions": "Stay in role.", "character_book": BOOK, "extensions": {}, "tags": [],
    },
}  # fmt: skip
V3 = V2 | {"spec": "chara_card_v3", "spec_version": "3.0", "data": V2["data"] | {"name": "Mia V3"}}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0" * 13) + b"".join(chunks) + chunk(b"IEND", b"")


def text_chunk(name, value):
    return chunk(b"tEXt", name + b"\0" + base64.b64encode(json.dumps(value).encode()))


def zipped(name, text, packing=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr(name, text)
    return file.getvalue()


TGWUI = b"name: Mia\ngreeting: |-\n  Hello, {{user}}!\ncontext: |\n  {{char}} is a baker.\n"
PYGMALION = {"char_name": "Mia", "char_persona": "{{char}} is a baker.", "char_greeting": "Hello, {{user}}!",
             "example_dialogue": "<START>", "world_scenario": "A shop."}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mia.yaml", TGWUI),
        ("mia.yml", b"\xef\xbb\xbf" + TGWUI),
        ("mia.json", json.dumps(PYGMALION).encode()),
        ("mia.json", json.dumps(V1).encode()),
        ("mia.json", json.dumps(V2).encode()),
        ("mia.png", png(text_chunk(b"chara", V1))),
        ("mia.png", png(text_chunk(b"chara", V2))),
        ("mia.png", png(chunk(b"zTXt", b"chara\0\0" + zlib.compress(base64.b64encode(json.dumps(V2).encode()))))),
        ("mia.png", png(chunk(b"iTXt", b"chara\0\0\0en\0x\0" + base64.b64encode(json.dumps(V2).encode())))),
        ("mia.charx", zipped("card.json", json.dumps(V2))),
    ],
)
def test_every_format_is_read(name, content):
    found = read_character(name, content)
    assert (found.name, found.description.strip()) == ("Mia", "{{char}} is a baker.")
    assert found.greetings[0] == "Hello, {{user}}!"


def test_v3_comes_before_v2_in_one_picture_and_every_field_is_kept():
    found = read_character("mia.png", png(text_chunk(b"chara", V2), text_chunk(b"ccv3", V3)))
    assert found.name == "Mia V3" and found.greetings == ("Hello, {{user}}!", "Good day.")
    assert (found.system, found.last_words, found.notes) == ("{{original}} Play {{char}}.", "Stay in role.", "by me")
    assert (found.book.scan_depth, found.book.token_budget, len(found.book.entries)) == (2, 50, 4)
    assert found.book.entries[0].place == "after" and found.book.entries[2].content == "It is morning."
    assert Character.read(json.loads(json.dumps(found.as_json()))) == found
    assert read_character("again.json", json.dumps(as_v2(found)).encode()) == found


def test_a_world_info_file_is_a_lorebook():
    entry = {"key": ["oven"], "keysecondary": ["cold"], "selective": True, "selectiveLogic": 2, "content": "Hot.", "order": 5,
             "position": 1, "disable": False, "constant": False, "comment": "oven"}  # fmt: skip
    book = read_lorebook("world.json", json.dumps({"entries": {"0": entry}}).encode())
    assert book.entries == (LoreEntry("Hot.", ("oven",), ("cold",), "not any", order=5, place="after", name="oven"),)
    assert len(read_lorebook("mia.json", json.dumps(V2).encode()).entries) == 4
    with pytest.raises(BadCharacter, match="lorebook and names no character"):
        read_character("world.json", json.dumps({"entries": {"0": entry}}).encode())


BOMB = zlib.compress(b"A" * 50_000_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no character"),
        (b"\xff\xfe\x00garbage", "UTF-8"),
        (b"just words", "holds no character"),
        (b"{", "no JSON"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"a: [" * 10_000, "nested too deeply"),
        (b"a: &x [1]\nb: *x", "refers to parts of itself"),
        (b"name: !!python/object/apply:os.system [id]", "neither a picture"),
        (b"name: [", "neither a picture"),
        (b"x" * 5_000_000, "a text may have"),
        (b"x" * 20_000_001, "are the limit"),
        (b"name: " + b"x" * 400_000, "a YAML file may have"),
        (json.dumps({"name": "", "description": "x"}).encode(), "needs a name"),
        (json.dumps({"name": "x", "description": "y" * 300_000}).encode(), "are the limit"),
        (
            json.dumps({"name": "x", "description": "", "character_book": {"entries": [{}] * 2001}}).encode(),
            "2,000 are the limit",
        ),
        (b"\xff\xd8\xff\xe0jpeg", "is no PNG"),
        (png(), "carries no character"),
        (png(chunk(b"tEXt", b"chara\0%%%")), "no JSON"),
        (png(chunk(b"tEXt", b"chara\0" + base64.b64encode(b"\xff\xfe"))), "UTF-8"),
        (png(chunk(b"zTXt", b"chara\0\0" + BOMB)), "when unpacked"),
        (png(chunk(b"iTXt", b"chara\0\1\0\0\0" + BOMB)), "when unpacked"),
        (png(chunk(b"zTXt", b"chara\0\0garbage")), "damaged"),
        (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR", "carries no character"),
        (zipped("card.json", "A" * 50_000_000), "longer than"),
        (zipped("other.json", "{}"), "no card.json"),
        (b"PK\x03\x04garbage", "no card.json"),
        (zipped("card.json", "{}", zipfile.ZIP_LZMA), "in a way that cards are not"),
        (zipped("card.json", "{}", zipfile.ZIP_BZIP2), "in a way that cards are not"),
        (zipped("card.json", "{}")[:40] + b"\xff" * 200, "no card.json"),
        (b"name: 1" + b":1" * 140_000, "are the limit"),  # a number to the base 60, in YAML 1.1
        (b"first_mes: 1" + b":1" * 2000 + b".5", "needs a name"),  # another, greater than any
        (b"first_mes: !!float x\nname: !!set {a}", "needs a name"),
    ],
)
def test_a_hostile_file_costs_a_sentence_and_less_than_a_moment(content, words):
    began = time.process_time()
    with pytest.raises(BadCharacter, match=words):
        read_character("x", content)
    assert time.process_time() - began < 5


def test_broken_unicode_and_names_of_several_lines_are_mended():
    found = read_character(
        "x.json", b'{"name": "a\\ud800\\n\\u0000b\\u202ec", "description": "\\udfff", "first_mes": 5, "tags": {}}'
    )
    assert found.name == "a\ufffd b c" and found.description == "\ufffd" and found.greetings == ()
    json.dumps(found.as_json()).encode()


# --- lorebook ----------------------------------------------------------------------------------------


def contents(book, *texts, **kwargs):
    return [each.content for each in lorebook.applying(book, texts, **kwargs)]


def test_keys_secondary_keys_constant_order_and_depth():
    book = read_character("x.json", json.dumps(V2).encode()).book
    assert contents(book, "Nothing.") == ["It is morning."]
    assert contents(book, "Is the OVEN on?") == ["It is morning.", "The oven is hot."]
    assert contents(book, "bread") == ["It is morning."]
    assert contents(book, "rye", "bread!") == ["It is morning.", "Rye is dark."]
    assert contents(book, "oven", "one", "two") == ["It is morning."]  # it looks at two messages
    assert contents(book, "ovens and ovenware") == ["It is morning."]


@pytest.mark.parametrize(("logic", "text", "applies"), [
    ("any", "a b", True), ("any", "a", False), ("all", "a b c", True), ("all", "a b", False),
    ("not any", "a", True), ("not any", "a b", False), ("not all", "a b", True), ("not all", "a b c", False),
])  # fmt: skip
def test_what_secondary_keys_may_want(logic, text, applies):
    book = Lorebook((LoreEntry("x", ("a",), ("b", "c"), logic),))
    assert contents(book, text) == (["x"] if applies else [])


def test_case_recursion_scripts_without_spaces_and_the_budget():
    assert contents(Lorebook((LoreEntry("x", ("Oven",), case_sensitive=True),)), "oven") == []
    linked = Lorebook((LoreEntry("see the mill", ("oven",)), LoreEntry("grinds", ("mill",))))
    assert contents(linked, "oven") == ["see the mill"]
    assert contents(replace(linked, recursive=True), "oven") == ["see the mill", "grinds"]
    assert contents(Lorebook((LoreEntry("x", ("竜",)),)), "黒い竜が来た") == ["x"]
    tight = Lorebook((LoreEntry("low", constant=True, order=9, priority=1), LoreEntry("high", constant=True, priority=5)), 4, 1)
    assert contents(tight, "", count=lambda text: 1) == ["high"]


def test_a_hostile_lorebook_takes_less_than_a_moment():
    keys = [tuple(f"{'a' * 90}{at} {number}" for at in range(50)) for number in range(2000)]
    book = Lorebook(tuple(LoreEntry("a" * 1000, each) for each in keys), scan_depth=100, recursive=True)
    began = time.process_time()
    contents(book, *["a" * 200_000] * 50)
    assert time.process_time() - began < 10


# --- prompt ------------------------------------------------------------------------------------------


def test_what_the_model_reads_of_a_character():
    value = character_prompt.cast(read_character("x.json", json.dumps(V2).encode()), Persona("Tom", "{{user}} is new here."))
    chat = [Message("assistant", "Hello, Tom!"), Message("user", "Is the oven on?")]
    first, *rest, last = character_prompt.messages(value, "Be brief.", chat)
    assert first.role == "system" and first.text.split("\n\n") == [
        "Be brief. Play Mia.", "It is morning.", "Mia is a baker.", "Mia's personality: warm", "Scenario: A shop.",
        "About Tom: Tom is new here.", "The oven is hot.", "Examples of how Mia talks:", "Tom: Bread?\nMia: Fresh.",
    ]  # fmt: skip
    assert rest == chat and last == Message("system", "Stay in role.")
    continued = character_prompt.messages(value, "", [*chat, Message("assistant", "Yes, it")])
    assert [each.role for each in continued] == ["system", "assistant", "user", "system", "assistant"]


def test_without_a_character_the_persona_is_there_and_a_system_prompt_stays_as_it_is():
    chat = [Message("user", "Hi")]
    assert character_prompt.messages({}, " Be {{user}}. ", chat) == [Message("system", "Be {{user}}."), *chat]
    assert character_prompt.messages({}, "", chat) == chat
    value = character_prompt.cast(None, Persona("Tom", "a sailor"))
    assert character_prompt.messages(value, "", chat)[0].text == "About Tom: a sailor"


def test_names_are_put_in_once():
    assert (
        with_names("{{ Char }} <USER> {{// note }}{{newline}}{{other}}", "{{user}}", "{{char}}")
        == "{{user}} {{char}} \n{{other}}"
    )


def test_a_conversation_begins_with_the_greeting_and_its_others_are_versions(tmp_path):
    store = ChatStore(tmp_path / "chats.sqlite3")
    value = character_prompt.cast(read_character("x.json", json.dumps(V2).encode()), Persona("Tom"))
    info = store.create("", character=value, system="Be brief.")
    character_prompt.greet(store, "", info.id)
    character_prompt.greet(store, "", info.id)  # not twice
    (shown,) = store.path("", info.id)
    assert (shown.role, shown.text, shown.version, shown.versions) == ("assistant", "Hello, Tom!", 1, 2)
    store.show_version("", info.id, shown.id, 1)
    assert store.path("", info.id)[0].text == "Good day."
    found = chat_prompt.messages_of(store.get("", info.id), store.path("", info.id))
    assert [each.role for each in found] == ["system", "system", "assistant"] and "Play Mia." in found[0].text
    assert chat_prompt.messages_of(ChatInfo("x", system="S"), ()) == [Message("system", "S")]
    store.close()


# --- store -------------------------------------------------------------------------------------------


def test_each_owner_has_their_own_and_deleting_can_be_undone(tmp_path):
    store = CharacterStore(tmp_path / "characters.sqlite3")
    store.save_character("ann", Character("Mia", "a baker"))
    store.save_persona("ann", Persona("Tom", "new here"))
    store.save_prompt("ann", "Brief", "Be brief.")
    assert store.names("ann", "character") == ["Mia"] and store.names("bob", "character") == []
    with pytest.raises(BadCharacter, match="no character called 'Mia'"):
        store.character("bob", "Mia")
    store.delete("ann", "character", "Mia")
    assert store.names("ann", "character") == []
    store.undelete("ann", "character", "Mia")
    store.close()
    again = CharacterStore(tmp_path / "characters.sqlite3")
    assert again.character("ann", "Mia").description == "a baker" and again.free_name("ann", "character", "Mia") == "Mia 2"
    assert again.persona("ann", "Tom").description == "new here" and again.prompt("ann", "Brief") == "Be brief."
    with pytest.raises(BadCharacter, match="saved under a name"):
        again.save_prompt("ann", " \n ", "x")
    again.close()


def test_a_damaged_file_is_set_aside_and_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    path = tmp_path / "characters.sqlite3"
    path.write_bytes(b"no database" * 100)
    store = CharacterStore(path)
    assert store.names("", "character") == [] and (tmp_path / "characters.damaged.sqlite3").is_file()
    store.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadCharacter, match="cannot be kept"):
        CharacterStore(tmp_path / "file" / "x.sqlite3").names("", "character")
