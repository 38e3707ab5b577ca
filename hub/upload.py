"""GPTQ folders to the branches of a repository on the Hub, with huggingface-hub's own client.

A file that the Hub has already, in another branch or from an upload that was cut, is not sent again: huggingface-hub asks for
each file's hash first. So the same call goes on where it ended.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import AccessDenied, BadParameter, DownloadFailed, GptqWebuiError
from ..core.model_ref import ModelRef
from ..core.models import MARKER
from . import hub_errors, hub_request
from .model_folder import FolderRecord
from .repository import Hub

MAIN = "main"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


@dataclass(frozen=True)
class Branch:
    folder: Path
    name: str  # of the branch that it becomes


def branches_of(folders: Sequence[Path]) -> list[Branch]:
    """Each folder and the branch that its record, or its name, gives it; the first one is `main` too.

    Raises BadParameter where two folders are the same branch, or a folder has no model.
    """
    found: list[Branch] = []
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise BadParameter(f"{folder} is no model: it has no config.json. Give folders that hold GPTQ models.")
        record = FolderRecord.read(folder / MARKER)
        ref = ModelRef.parse(record.ref) if record is not None and "/" in record.ref else None
        name = ref.branch if ref is not None else folder.name.rpartition("_gptq-")[1][1:] + folder.name.rpartition("_gptq-")[2]
        name = name if name.startswith("gptq-") else MAIN
        if any(name == each.name for each in found):
            raise BadParameter(f"{folder.name} would become the branch {name}, as another folder. Give only one of them.")
        found.append(Branch(folder, name))
    if found and all(each.name != MAIN for each in found):
        found.insert(0, Branch(found[0].folder, MAIN))
    return found


def upload(hub: Hub, repo: str, branches: Sequence[Branch], *, private: bool, say: Callable[[str], None]) -> str:
    """Send the folders; returns the address of the repository, which is made if there is none.

    Hidden files, and this program's record of a folder, stay here. Raises BadParameter, AccessDenied (no token, or one that
    may not write), HubUnreachable and DownloadFailed (the Hub refuses).
    """
    if not _REPOSITORY.fullmatch(repo):
        raise BadParameter(f"{repo!r} is not the name of a repository. Write owner/name.")
    hub_request.require_online(hub.endpoint)
    token = hub.token()
    if not token:
        raise AccessDenied(
            "Uploading needs an access token that may write. Run `hf auth login`, or set HF_TOKEN, or save one in the Model tab."
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=hub.endpoint, token=token, user_agent=hub_request.USER_AGENT)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        for branch in branches:
            files = sorted(each for each in branch.folder.iterdir() if each.is_file() and _is_sent(each.name))
            say(f"{branch.folder.name} → {repo}:{branch.name} ({len(files)} files)")
            if branch.name != MAIN:
                api.create_branch(repo, branch=branch.name, exist_ok=True)
            operations = [CommitOperationAdd(each.name, str(each)) for each in files]
            words = f"GPTQ weights, {branch.name}" if branch.name != MAIN else "GPTQ weights"
            api.create_commit(repo, operations, commit_message=words, revision=branch.name)
    except GptqWebuiError:
        raise
    except Exception as error:  # of huggingface-hub, httpx, requests or hf-xet
        raise _in_words(error, repo, hub.endpoint) from None
    return f"{hub.endpoint}/{repo}"


def _is_sent(name: str) -> bool:
    return not name.startswith(".") and name != MARKER


def _in_words(error: Exception, repo: str, endpoint: str) -> GptqWebuiError:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    host = hub_errors.host_of(endpoint)
    if status is None:
        if isinstance(error, (OSError, RuntimeError)) or "httpx" in type(error).__module__:
            return hub_errors.unreachable(endpoint, error)
        return DownloadFailed(f"The upload to {repo} failed before the Hub answered. Check the folder, then try again.")
    if status == 401:
        return AccessDenied(f"{host} does not accept your token. Run `hf auth login` again, or correct HF_TOKEN.")
    if status in (403, 404):
        return AccessDenied(
            f"{host} does not let your token write to {repo}. Use a token with the right to write, and an owner that is your "
            "account or an organisation of yours."
        )
    if status >= 500 or status == 429:
        return hub_errors.busy(endpoint, status)
    said = str(response.headers.get("X-Error-Message", ""))[:200]
    return DownloadFailed(
        f"{host} refused the upload to {repo} with status {status}{f' ({said})' if said else ''}. Try again later."
    )
