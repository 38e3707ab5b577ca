"""Pictures of a message: texts that are data: URLs, as OpenAI's protocol takes them. Nothing here decodes one."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import replace

from .chat import Message
from .errors import GptqWebuiError

MOST_PICTURE_CHARACTERS = 4_000_000  # of one data: URL, about 3 MB
MOST_PICTURES = 8  # of one message
_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
_BEGINNINGS = {"png": rb"\x89PNG\r\n\x1a\n", "jpeg": rb"\xff\xd8\xff", "webp": rb"RIFF....WEBP", "gif": rb"GIF8[79]a"}


def is_picture(text: str) -> bool:
    """Whether a text is the data: URL of a PNG, JPEG, WebP or GIF, by its first bytes."""
    found = _URL.match(text)
    if found is None:
        return False
    begin = text[found.end() : found.end() + 16]
    try:
        return re.match(_BEGINNINGS[found[1]], base64.b64decode(begin[: len(begin) // 4 * 4]), re.S) is not None
    except (ValueError, binascii.Error):
        return False


def picture_of(data: str) -> str | None:
    """The data: URL of a picture whose base64 is given without its kind; None for what is no picture."""
    return next((url for kind in _BEGINNINGS if is_picture(url := f"data:image/{kind};base64,{data}")), None)


def require_pictures(files: Sequence[tuple[str, str]]) -> None:
    """Of (name, data: URL). Raises GptqWebuiError for too many, a large one and one that is damaged."""
    if len(files) > MOST_PICTURES:
        raise GptqWebuiError(f"A message may have {MOST_PICTURES} pictures; found {len(files)}. Send them in several messages.")
    for name, url in files:
        if len(url) > MOST_PICTURE_CHARACTERS:
            most = MOST_PICTURE_CHARACTERS * 3 // 4_000_000
            raise GptqWebuiError(f"{name} is larger than {most} MB. Make it smaller, then attach it again.")
        if not _BASE64.fullmatch(url, url.index(",") + 1):
            raise GptqWebuiError(f"{name} is damaged: its data is no base64. Attach the picture again.")


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """For a model that reads text alone: a note stands where pictures were."""
    return [_with_note(each) if each.pictures else each for each in messages]


def _with_note(message: Message) -> Message:
    count = len(message.pictures)
    note = (
        "(A picture is attached that you cannot see.)" if count == 1 else f"({count} pictures are attached that you cannot see.)"
    )
    return replace(message, text=f"{note}\n\n{message.text}" if message.text else note, pictures=())
