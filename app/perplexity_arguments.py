"""The arguments of `gptq-webui perplexity`."""

import argparse
from pathlib import Path


def add_to(parser: argparse.ArgumentParser) -> None:
    """Its own arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="its name or folder (default: the last one used)")
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="texts in UTF-8, read as one (default: Python's manual)"
    )
    parser.add_argument("--demo", action="store_true", help="measure the demo model; MODEL is then the first FILE")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="tokens read at once (default: 1024, or the context)")
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS", help="a window begins every so many tokens (default: half a window)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of text, at most (default: all of the files; 8192 of the manual)"
    )
    parser.add_argument("--json", action="store_true", help="write the result as JSON on stdout")
