"""Show a server's key to that server alone, over a connection that nobody else can read, and in no text of ours."""

import base64
import os
import re
from urllib.parse import quote

from fuselm.system.addresses import Address, is_this_machine

DEFAULT_KEY_VARIABLE = "FUSELM_API_KEY"  # the environment variable that is looked at for a key if no other is named
HIDDEN_KEY = "[key]"
LONG_KEY = 8  # characters of a key that is not a word by chance: forms of it are looked for, too


def read_key(url: str, address: Address, *, key_env: str | None, key_over_http: bool) -> str:
    """Return the key for the server at `url`, or "" if the environment has none.

    Raises `ValueError` if `key_env` names a variable that isn't set, if the key can't be in a header, or if it would be
    sent where others can read it and the run file doesn't allow that.
    """
    name = key_env or DEFAULT_KEY_VARIABLE
    key = os.environ.get(name, "").strip()
    if key_env and not key:
        raise ValueError(f"{url}: its key should be in the environment variable {key_env}, which is not set; export it")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError(
            f"{url}: the key in {name} holds a space, a line break or a character that is not ASCII, which no HTTP "
            "header can carry; export it again"
        )
    if key and address.scheme == "http" and not key_over_http and not is_this_machine(address.host):
        raise ValueError(
            f"{url}: the key in {name} would be sent to {address.host} over plain http, where others can read it; use "
            "https or a tunnel to localhost, or set `key_over_http: true` for this source"
            + ("" if key_env else f"; a server that needs no key: unset {name}, and name others' with `key_env`")
        )
    return key


def hide_key(text: str, key: str) -> str:
    """Return `text` without the key, in whichever of the usual ways of writing it a server may have put it there."""
    if not key:
        return text
    for form in sorted(_spell_key(key), key=len, reverse=True):
        text = re.sub(form, HIDDEN_KEY, text, flags=re.IGNORECASE)
    return text


def _spell_key(key: str) -> set[str]:
    """Return patterns of the key itself, quoted for URLs, in hexadecimal digits, spaced and in base 64."""
    forms = {re.escape(key)}
    if len(key) < LONG_KEY:
        return forms
    forms |= {re.escape(quote(key, safe="")), re.escape(key.encode().hex())}
    if not re.search(r"[\W_]{5}", key):  # there would be too many ways to match those
        forms |= {r"[\W_]{0,2}".join(map(re.escape, key))}
    for before in range(3):  # bytes in front of it, which shift its letters
        coded = base64.b64encode(b"\0" * before + key.encode()).decode().rstrip("=")
        whole = coded[(0, 2, 3)[before] : -1]  # the first and last letters hold bits of what is beside it
        forms |= {re.escape(whole), re.escape(whole.replace("+", "-").replace("/", "_"))}
    return forms
