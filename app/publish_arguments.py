"""The arguments of `gptq-webui export` and `upload`, without a heavy import."""

import argparse
from pathlib import Path


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="its name or folder")
    parser.add_argument("--as", dest="form", choices=("16bit", "gptq"), default="16bit", help="what is written (default: 16bit)")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="a LoRA adapter (PEFT) that is merged; gptq: quantised again with it"
    )
    parser.add_argument(
        "--format", choices=("gptq", "gptq_v2"), help="layout of the zero points of gptq (default: gptq, if it can hold them)"
    )
    parser.add_argument(
        "--dataset", default="built-in", metavar="FILE", help="gptq with --adapter: calibration text, as for quantize"
    )
    parser.add_argument("--seq-len", type=int, default=0, metavar="TOKENS", help="gptq with --adapter: tokens of a sample")
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="gptq with --adapter: samples, at most (default: 128)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="the new folder (default: one beside the models)")


def add_upload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="names or folders; the first one becomes main too")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="the repository; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="if the repository is made: only you can see it")
