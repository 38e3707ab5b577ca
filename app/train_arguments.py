"""The arguments of `gptq-webui train`, without a heavy import."""

import argparse
from pathlib import Path


def add_to(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="a GPTQ model (or one of 16 bits): its name or folder")
    parser.add_argument("data", type=Path, metavar="FILE", help=".jsonl or .json of conversations or instructions, or a .txt")
    parser.add_argument("--name", help="of the adapter, a folder beside the model (default: MODEL-FILE)")
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapter (default: 16)")
    parser.add_argument("--alpha", type=int, default=32, metavar="A", help="it is scaled by A / rank (default: 32)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="SHARE", help="of its inputs (default: 0)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, metavar="RATE", help="the highest (default: 0.0002)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="times that every text is read (default: 3)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="texts of a step (default: 4)")
    parser.add_argument("--length", type=int, default=1024, metavar="TOKENS", help="of a text, at most (default: 1024)")
    parser.add_argument("--targets", default="", metavar="NAMES", help="layers, as q_proj,v_proj (default: every linear layer)")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS", help="between checkpoints (default: 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first weights and the order (default: 0)")
