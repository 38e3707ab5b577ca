"""Access from the command line: addresses, page passwords, API keys, other sites."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import BadParameter

if TYPE_CHECKING:
    from ..api.auth import Keys
    from ..api.guard import Hosts

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHARE_HOST = ".gradio.live"
PER_CLIENT = 16


def add(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument("--host", default=None, help="address to listen on (default: this machine only)")
    group.add_argument("--listen", action="store_true", help="listen on every network (0.0.0.0), with a password and API keys")
    group.add_argument("--share", action="store_true", help="make a public link, with a password for you and one for guests")
    group.add_argument("--auth", metavar="USER:PASSWORD", help="the page asks for this user and password, and the API for a key")
    group.add_argument("--api-key", metavar="KEY", help="API clients must send this key (or GPTQ_WEBUI_API_KEY)")
    group.add_argument("--admin-key", metavar="KEY", help="a key that may also load and download (or GPTQ_WEBUI_ADMIN_KEY)")
    group.add_argument("--no-auth", action="store_true", help="no password and no key, even on every network")
    group.add_argument(
        "--allowed-host", action="append", metavar="NAME", help="another name that this server answers to, besides its addresses"
    )
    group.add_argument(
        "--cors", "--cors-allow-origin", action="append", metavar="ADDRESS", help="a web site whose pages may call the API, or *"
    )
    group.add_argument(
        "--per-client",
        type=int,
        metavar="N",
        help="answers of one address, key or login that run or wait, at most (default: 16 if others can reach the server; "
        "0: half of --queue)",
    )


def host_of(options: argparse.Namespace) -> str:
    return str(options.host or ("0.0.0.0" if options.listen else "127.0.0.1"))


def is_wide(options: argparse.Namespace) -> bool:
    """Whether others can reach the server."""
    return host_of(options) not in LOOPBACK


def per_client(options: argparse.Namespace) -> int | None:
    """Answers of one address, key or login that may run or wait; None: no limit of its own. Raises BadParameter."""
    if options.per_client is None:
        return PER_CLIENT if is_wide(options) or options.share else None
    if options.per_client < 0:
        raise BadParameter(f"--per-client {options.per_client} is not a number of answers. Give 1 or more, or 0 for no limit.")
    return options.per_client or None


def hosts(options: argparse.Namespace) -> "Hosts":
    from ..api.guard import Hosts

    names = {each.lower() for each in options.allowed_host or ()}
    if is_wide(options) and not host_of(options).replace(".", "").replace(":", "").isalnum():
        names.add(host_of(options).lower())
    if options.share:
        names.add(SHARE_HOST)
    return Hosts(is_wide(options), names)


def users(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, password) of the owner and, with --share, of the guests. Raises BadParameter."""
    found: list[tuple[str, str]] = []
    if options.auth:
        name, colon, password = options.auth.partition(":")
        if not colon or not name or not password:
            raise BadParameter("--auth needs USER:PASSWORD, for example --auth me:correct-horse.")
        found.append((name, password))
    elif options.share or (is_wide(options) and not options.no_auth):
        found.append(("owner", secrets.token_urlsafe(9)))
    if options.share:
        found.append(("guest" if found[0][0] != "guest" else "visitor", secrets.token_urlsafe(9)))
    return found


def made(options: argparse.Namespace, users: list[tuple[str, str]]) -> frozenset[str]:
    """The names among `users` whose passwords this program made, of 72 random bits."""
    chosen = options.auth.partition(":")[0] if options.auth else None
    return frozenset(name for name, _password in users if name != chosen)


def keys(options: argparse.Namespace, say: Callable[[str], None], path: Path | None = None) -> "Keys":
    """The keys that API requests need.

    A server that others can reach, or whose page has a password, makes keys for its run if there are none: a password
    for the page alone would leave the same model open at the same address.
    """
    from ..api.auth import Keys, keys_file

    found = Keys(None if options.no_auth else path or keys_file())
    given = options.api_key or os.environ.get("GPTQ_WEBUI_API_KEY")
    admin = options.admin_key or os.environ.get("GPTQ_WEBUI_ADMIN_KEY")
    if options.no_auth:
        if options.share or given or admin:
            raise BadParameter(
                "--no-auth means no key and no password. It cannot be combined with --share, --api-key or --admin-key: "
                "leave one out."
            )
        return found
    if given:
        found.add_for_run(given, "--api-key", admin=False)
    if admin:
        found.add_for_run(admin, "--admin-key", admin=True)
    if (is_wide(options) or options.share or options.auth) and not found.required:
        made = {"to use the model": "gw-" + secrets.token_urlsafe(24), "to change it as well": "gw-" + secrets.token_urlsafe(24)}
        say("API keys of this run (`gptq-webui keys new NAME` makes permanent ones):")
        for at, (what, key) in enumerate(made.items()):
            found.add_for_run(key, "admin of this run" if at else "this run", admin=bool(at))
            say(f"  {key}  {what}")
    return found


def run_keys(options: argparse.Namespace) -> int:
    """`gptq-webui keys`: list, make, remove."""
    from ..api.auth import Keys, keys_file

    found = Keys(keys_file())
    if options.action == "new":
        key = found.make(_named(options), admin=options.admin)
        print(json.dumps({"name": options.name, "key": key}) if options.json else key)
        print("This key is shown only once; a hash of it is kept. From now on every API request needs a key.", file=sys.stderr)
    elif options.action == "remove":
        found.remove(_named(options))
    elif options.json:
        print(json.dumps([{"name": each.name, "admin": each.admin, "made": each.made} for each in found.stored()]))
    else:
        for each in found.stored():
            print(f"{each.name}\t{'admin' if each.admin else 'use'}\t{each.made}")
    return 0


def _named(options: argparse.Namespace) -> str:
    if not options.name:
        raise BadParameter(f"The name of the key is missing. Write: gptq-webui keys {options.action} NAME.")
    return str(options.name)
