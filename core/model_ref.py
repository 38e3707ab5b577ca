"""`owner/name:branch`, how this project names a model on the Hub.

People paste into text boxes, so `parse` also accepts addresses of the Hub and extra spaces.
An error shows an example of what it accepts.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from .errors import BadModelName

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_NOT_IN_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|\.lock(?:/|$)|(?:^|/)\.")  # git-check-ref-format(1)
_NOT_IN_FOLDER = re.compile(r'[/\\<>:"|?*]')  # Windows forbids these in names


@dataclass(frozen=True)
class ModelRef:
    """A repository on the Hub and one of its branches."""

    repo: str  # "owner/name"
    branch: str = "main"

    @classmethod
    def parse(cls, text: str) -> "ModelRef":
        """Read `owner/name`, `owner/name:branch` or a Hub address with or without /tree/branch.

        Raises BadModelName, which says what to write instead.
        """
        given = text.strip().strip("'\"").strip()
        if not given:
            raise BadModelName(text, "it is empty")
        if re.match(r"(?i)https?://", given) or re.match(r"(?i)(www\.)?(huggingface\.co|hf\.co)/", given):
            repo, branch = _split_address(given, text)
        else:
            repo, _, branch = given.partition(":")
            if ":" in given and not branch.strip():
                raise BadModelName(text, "there is nothing after the colon")
        repo, branch = repo.strip().strip("/"), branch.strip().strip("/") or "main"
        owner, slash, name = repo.partition("/")
        if not slash:
            raise BadModelName(text, "the owner is missing")
        if "/" in name:
            raise BadModelName(text, "it has more than one slash before the branch; a branch follows a colon")
        for part in (owner, name):
            if not _PART.fullmatch(part) or ".." in part or "--" in part or len(part) > 96:
                raise BadModelName(text, f"{part!r} cannot be an owner or a name on the Hub" if part else "a part is missing")
        if _NOT_IN_BRANCH.search(branch) or branch.startswith("-") or branch.endswith(".") or len(branch) > 200:
            raise BadModelName(text, f"{branch!r} cannot be a branch")
        return cls(repo, branch)

    @property
    def folder_name(self) -> str:
        """`owner_name`, or `owner_name_branch`: the name text-generation-webui gives the folder."""
        name = self.repo.replace("/", "_")
        if self.branch != "main":
            name += "_" + _NOT_IN_FOLDER.sub("_", self.branch)
        return name

    def __str__(self) -> str:
        return self.repo if self.branch == "main" else f"{self.repo}:{self.branch}"


def _split_address(address: str, text: str) -> tuple[str, str]:
    parts = urlsplit(address if "://" in address else "https://" + address)
    pieces = [unquote(piece) for piece in parts.path.split("/") if piece]
    if pieces[:1] == ["models"]:
        pieces = pieces[1:]
    if pieces[:1] and pieces[0] in ("datasets", "spaces"):
        raise BadModelName(text, f"it is the address of something under /{pieces[0]}, not of a model")
    if len(pieces) < 2:
        raise BadModelName(text, "the address does not name a repository")
    repo = "/".join(pieces[:2])
    if len(pieces) == 2:
        return repo, "main"
    if pieces[2] == "tree" and len(pieces) > 3:
        return repo, "/".join(pieces[3:])
    if pieces[2] in ("blob", "resolve", "raw") and len(pieces) > 3:
        return repo, pieces[3]
    if pieces[2] in ("tree", "discussions", "commits"):
        return repo, "main"
    raise BadModelName(text, f"/{pieces[2]} after the repository means nothing here")
