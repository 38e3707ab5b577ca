"""The arguments of `gptq-webui download`; those of huggingface-cli keep its names and meanings. Imports nothing heavy."""

import argparse
from pathlib import Path


def add_to(parser: argparse.ArgumentParser) -> None:
    """The arguments; those of huggingface-cli keep its names and meanings."""
    add = parser.add_argument
    add("ref", metavar="REF", help="for example TheBloke/Mistral-7B-Instruct-v0.2-GPTQ:gptq-4bit-32g-actorder_True")
    add("files", metavar="FILE", nargs="*", help="only these files of the repository")
    add("--revision", metavar="BRANCH", help="the branch, or a commit; the same as REF:BRANCH")
    add("--local-dir", type=Path, metavar="DIR", help="put the files directly into this folder")
    add("--cache-dir", type=Path, metavar="DIR", help="put the model into a Hugging Face cache in this folder")
    add("--token", help="access token of the Hub (better: `hf auth login`, or HF_TOKEN)")
    add("--include", nargs="+", action="extend", default=[], metavar="GLOB", help="only files that match")
    add("--exclude", nargs="+", action="extend", default=[], metavar="GLOB", help="no files that match")
    add("--max-workers", type=int, metavar="N", help="files at once (default: 4)")
    add("--any-kind", action="store_true", help="download it even if it is not a GPTQ model")
    add("--allow-pickle", action="store_true", help="download .bin and .pt weights too; opening them can run code")
    add("--json", action="store_true", help="write the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress")
    add("--local-dir-use-symlinks", help=argparse.SUPPRESS)
    add("--repo-type", help=argparse.SUPPRESS)
    for name in ("--resume-download", "--force-download"):
        add(name, action="store_true", help=argparse.SUPPRESS)
