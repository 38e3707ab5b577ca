"""Several engines that serve the same model: which of them answer, which is least busy. For one event loop."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core import foreign_errors
from ...core.errors import AnswerFailed

log = logging.getLogger(__name__)

CHECK_S = 10.0  # between two looks at every engine
_CHECK_TIMEOUT_S = 5.0


@dataclass
class Endpoint:
    """One engine, with its openai client."""

    url: str
    client: Any
    well: bool = False
    asked: bool = False  # at least once
    answering: int = 0
    wrong: str = ""  # what was the matter when it was last asked
    strict: bool = False  # it refuses parameters that OpenAI does not have
    models: list[Any] = field(default_factory=list)  # as it listed them

    async def check(self) -> None:
        """Ask for its models; never raises."""
        try:
            page = await self.client.with_options(timeout=_CHECK_TIMEOUT_S).models.list()
            self.models = list(page.data or [])
        except Exception as error:
            if getattr(error, "status_code", None) not in (
                404,
                405,
                501,
            ):  # with these it is there, and does not list what it has
                self.fail(error)
                return
        if self.asked and not self.well:
            log.info("the engine at %s answers again", self.url)
        self.well, self.asked, self.wrong = True, True, ""

    def fail(self, error: Exception) -> None:
        """Leave it out until it answers a check again."""
        if self.well or not self.asked:
            log.warning("the engine at %s does not answer (%s)", self.url, in_words(error))
        self.well, self.asked, self.wrong = False, True, in_words(error)


class Pool:
    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = list(endpoints)

    async def check(self) -> None:
        await asyncio.gather(*(each.check() for each in self.endpoints))

    async def watch(self) -> None:
        """Look at every engine now and then, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            await self.check()

    async def close(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(each.client.close() for each in self.endpoints), return_exceptions=True)

    async def least_busy(self, but: Sequence[Endpoint] = ()) -> Endpoint:
        """The engine with the fewest answers under way, of those that work. Raises AnswerFailed if there is none."""
        if not (well := self._well(but)):
            await self.check()
            well = self._well(but)
        if not well:
            raise AnswerFailed(f"No engine answers: {self.troubles()}. Start one, or choose another model.")
        return min(well, key=lambda each: each.answering)

    def _well(self, but: Sequence[Endpoint]) -> list[Endpoint]:
        return [each for each in self.endpoints if each.well and each not in but]

    def troubles(self) -> str:
        return "; ".join(f"{each.url}: {each.wrong or 'not asked yet'}" for each in self.endpoints)


def in_words(error: Exception) -> str:
    """What an openai or httpx error says, short, without our key."""
    kind = type(error).__name__
    if kind in ("APITimeoutError", "ReadTimeout", "TimeoutError"):
        return "no answer in time"
    if kind in ("APIConnectionError", "ConnectError", "ReadError", "RemoteProtocolError"):
        return "no connection"
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return "it refuses the key"
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    first = foreign_errors.in_words(AnswerFailed(text) if isinstance(text, str) and text else error)
    return f"error {status}: {first}" if status else first
