"""The host's log: a logger of its own; everybody else's lines go to a root logger that discards them."""

import logging

logger = logging.getLogger("textgen")
logger.setLevel(logging.DEBUG)
logging.basicConfig(level=logging.ERROR, handlers=[logging.NullHandler()])
_terminal = logging.StreamHandler()
_terminal.setFormatter(logging.Formatter("HOST %(message)s"))
logger.addHandler(_terminal)
