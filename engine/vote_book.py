"""The votes of blind comparisons, one file for each login in the user's data folder."""

import contextlib
import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import BadParameter
from ..core.user_folders import data_folder
from .comparison import VOTES, Comparison

_MOST_VOTES = 10_000  # the oldest are forgotten


@dataclass(frozen=True)
class Tally:
    """One model in all votes."""

    name: str
    won: int = 0
    lost: int = 0
    tied: int = 0  # both good, or both bad

    @property
    def share(self) -> float:
        """Of the comparisons, a tie as a half."""
        return (self.won + self.tied / 2) / (self.won + self.lost + self.tied)


class VoteBook:
    """Safe from several threads. Each call names the owner, who is the login ("" where nobody logs in)."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` holds a file for each owner; by default it is in the user's data folder."""
        self._folder = folder
        self._lock = threading.Lock()

    def vote(self, owner: str, comparison: Comparison, vote: str) -> None:
        """Count a vote; now the comparison is open. Raises BadParameter if there is nothing to vote on, or it cannot be saved."""
        with self._lock:
            if vote not in VOTES or not comparison.waits_for_vote:
                raise BadParameter("There is no blind comparison that waits for a vote. Compare two models first.")
            models = [side.name for side in comparison.sides]
            votes = [*self._read(owner), {"models": models, "vote": vote, "at": int(time.time())}]
            self._write(owner, votes[-_MOST_VOTES:])
            comparison.vote = vote

    def tally(self, owner: str) -> list[Tally]:
        """Every model that was voted on, the best first."""
        found: dict[str, Tally] = {}
        with self._lock:
            votes = self._read(owner)
        for each in votes:
            for at, name in enumerate(each["models"]):
                old = found.get(name, Tally(name))
                won = each["vote"] == ("first", "second")[at]
                lost = each["vote"] == ("second", "first")[at]
                found[name] = Tally(name, old.won + won, old.lost + lost, old.tied + (not won and not lost))
        return sorted(found.values(), key=lambda each: (-each.share, each.name))

    def forget(self, owner: str) -> None:
        """Remove all votes."""
        with self._lock, contextlib.suppress(OSError):
            self._path(owner).unlink(missing_ok=True)

    def _path(self, owner: str) -> Path:
        name = hashlib.sha256(owner.encode("utf-8", "surrogatepass")).hexdigest()[:24] if owner else "votes"
        return (self._folder or data_folder() / "comparisons") / f"{name}.json"

    def _read(self, owner: str) -> list[dict[str, Any]]:
        values: Any = None
        with contextlib.suppress(OSError, ValueError, RecursionError):
            values = json.loads(self._path(owner).read_text(encoding="utf-8-sig"))
        return [each for each in values if _is_vote(each)] if isinstance(values, list) else []

    def _write(self, owner: str, votes: list[dict[str, Any]]) -> None:
        path = self._path(owner)
        draft = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                json.dump(votes, file)
            os.replace(draft, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise BadParameter(
                f"Your vote could not be saved ({error.strerror}), so it is not counted. "
                "Make room on the disk, or the folder of votes writable, and vote again."
            ) from None


def _is_vote(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("vote") in list(VOTES)
        and isinstance(value.get("models"), list)
        and len(value["models"]) == 2
        and all(isinstance(each, str) for each in value["models"])
    )
