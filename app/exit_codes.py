"""The exit codes. Scripts may rely on them. argparse has the same 2 for wrong usage."""

import argparse
import json
import sys

from ..core.errors import (
    AccessDenied,
    BadModelName,
    BadParameter,
    DiskFull,
    DownloadFailed,
    GptqWebuiError,
    HubUnreachable,
    NoSuchBranch,
    NoSuchRepository,
    WrongRepository,
)

DONE, OTHER, USAGE, DAMAGED, INTERRUPTED = 0, 1, 2, 8, 130
_OF: dict[type[GptqWebuiError], int] = {
    BadParameter: USAGE,
    BadModelName: USAGE,
    NoSuchRepository: 3,
    NoSuchBranch: 3,
    AccessDenied: 4,
    HubUnreachable: 5,
    WrongRepository: 6,
    DiskFull: 7,
    DownloadFailed: DAMAGED,
}
HELP = (
    "exit codes: 0 done, 1 another error, 2 wrong usage, 3 no such repository or branch, 4 access denied (gated, private, "
    "token), 5 no network or HF_HUB_OFFLINE, 6 not a GPTQ model, 7 the disk is full, 8 a file is damaged or does not arrive, "
    "130 Ctrl+C"
)


def of(error: GptqWebuiError) -> int:
    return next((code for kind, code in _OF.items() if isinstance(error, kind)), OTHER)


def report(error: GptqWebuiError, options: argparse.Namespace) -> int:
    """Say why a command failed, with --json as one line of JSON too; returns the exit code."""
    code = of(error)
    print(f"gptq-webui: {error}", file=sys.stderr)
    if getattr(options, "json", False):
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": code}))
    return code
