"""The arguments of `gptq-webui export` and `upload`, without a heavy import."""

import argparse
from pathlib import Path


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="its name or folder")
    parser.add_argument("--as", dest="form", choices=("16bit", "gptq"), default="16bit", help="what is written (default: 16bit)")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter (PEFT) that is merged, for 16bit")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the new folder (default: one beside the models)")


def add_upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="names or folders; the first one becomes main too")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="if the repository is made: only you can see it")
