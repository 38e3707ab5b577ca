"""The arguments of `gptq-webui chat`, without a heavy import."""

import argparse


def add_to(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="the model to chat with (default: the last one used)")
    add("--demo", action="store_true", help="chat with the demo model")
    add("--system", metavar="TEXT", help="system prompt of the new conversation")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--continue", dest="go_on", action="store_true", help="go on with the latest conversation")
    which.add_argument("--open", metavar="WORDS", help="go on with the latest conversation that has these words, or this id")
    which.add_argument("--forget", action="store_true", help="keep nothing of this chat")
    add("--user", metavar="NAME", default="", help="the conversations of this login of the page (default: those without a login)")
    add("--temperature", type=float, help="0 always takes the likeliest token")
    add("--max-new-tokens", type=int, metavar="N", help="cut each answer after N tokens")
    add("--seed", type=int, help="the same seed gives the same answers")
    add("--plain", action="store_true", help="show Markdown as it is written")
    add("--json", action="store_true", help="from a pipe: each answer as one line of JSON")
    parser.description = (
        "Chats in the terminal; /help lists what you can type. From a pipe it answers each line and ends at its end. "
        "The conversations are those of the page."
    )
