"""The arguments of `gptq-webui quantize`, without a heavy import."""

import argparse
from pathlib import Path

from ..core.quantize_config import BITS


def add_to(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("source", metavar="SOURCE", help="a 16-bit folder, a model's name, or owner/name to download")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="bits of a weight (default: 4)")
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="weights of one scale; -1: no groups (default: 128)"
    )
    parser.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the most active inputs first (default: yes)",
    )
    parser.add_argument("--damp", type=float, default=0.1, metavar="SHARE", help="damping of the Hessian (default: 0.1)")
    parser.add_argument(
        "--dataset",
        default="built-in",
        metavar="FILE",
        help="calibration text, .txt or .jsonl (default: built-in)",
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="TOKENS",
        help="tokens of a sample (default: 4096, or the model's context if that is shorter)",
    )
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="samples, at most (default: 128)")
    parser.add_argument(
        "--branches",
        metavar="LIST",
        help="several in one pass: gptq-4bit-32g-actorder_True,…; or: all",
    )
    parser.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq", help="layout of the zero points (default: gptq)")
    parser.add_argument("--asymmetric", action="store_true", help="a zero point for every group")
    parser.add_argument(
        "--lm-head",
        type=int,
        nargs="?",
        const=8,
        default=0,
        choices=BITS,
        metavar="BITS",
        help="pack the output layer, too, in so many bits (8 if none are given); transformers' own loader cannot open that",
    )
    parser.add_argument(
        "--leave",
        action="append",
        default=[],
        metavar="PATTERN",
        help="layers that stay in 16 bits: a part of their names, such as experts or down_proj, or a regular expression; may "
        "be given several times",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the folders are made (default: the models folder)")
    parser.add_argument(
        "--measure",
        type=int,
        nargs="?",
        const=4096,
        default=0,
        metavar="TOKENS",
        help="measure perplexity and KL divergence to the original on so much text, for the model card (4096 if none are given)",
    )
