"""Passwords and tokens kept out of what other people read: tags, parameters, messages."""

from __future__ import annotations

import re
from typing import Any

# Between a user's name and the host. A database's password may hold a slash, as it is written by many; a web address
# with a slash before its @ has a port and a path.
_AUTHORITY = re.compile(
    r"(?P<scheme>\w[\w+.-]*)://(?P<user>[^\s/:'\"]*?)(?P<password>:[^\s/'\"]*|:(?!\d+/)[^\s'\"]*?)?@"
    r"(?=[^\s/@'\"]+(?:[/\s'\"]|$)|/[^\s@'\"]*(?:[\s'\"]|$)|[\s'\"]|$)"
)
_QUERY = re.compile(r"(?i)([?&#][\w.-]*(?:passw|pwd|token|secret|key|sig|credential|authorization)[\w.-]*=)[^&\s'\"]+")
_TOKEN = r"(?:(?:access|api|auth|id|refresh|session)[_-]?)?token"
# Variables of an environment before a command, and connection strings, also within a URL.
_NAMED = re.compile(
    r"(\b[A-Z0-9_]*(?:PASSWORD|PASSWD|_PWD|SSHPASS|PASSPHRASE|TOKEN|SECRET|CREDENTIALS?|API_?KEY|PRIVATE_?KEY"
    r"|ACCESS_?KEY(?!_ID))[A-Z0-9_]*="
    r"|(?i:(?:\b|(?<=%3B))(?:password|passwd|pwd|accountkey|sharedaccesskey|passphrase"
    rf"|{_TOKEN}) ?(?:=|%3D) ?))"
    r"(?:'[^']*'|\"[^\"]*\"|(?:(?!%3B)[^&;\s'\"])+)"
)
# Keys of dictionaries, as they are printed, and headers of other names.
_SECRET = r"passw(?:or)?d|pwd|secret|api[_-]?key|access[_-]?key(?!_id)|auth[_-]?token|credential"
_KEYED = re.compile(
    rf"(?i)(['\"]?\b(?:[\w-]*(?:{_SECRET})|(?:set-)?cookie)['\"]?: ?|['\"]{_TOKEN}['\"]: ?)"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",;}]+)"
)
_KEY = re.compile(rf"(?i){_SECRET}|^token$|[_-]token$(?<!class_token)")
_HEADER = re.compile(r"(?i)(\bauthorization['\"]?: ?['\"]?(?:(?:basic|bearer|token) )?|\bbearer )[^\s'\"]+")


def without_secrets(text: str) -> str:
    """A text, such as a URI or a command line, with *** in the place of passwords and tokens.

    That is what stands between a user's name and the host of a URL, a lone name before a web server (a token),
    parameters of a query that are called so, variables such as MLFLOW_TRACKING_TOKEN=…, passwords of connection strings
    and headers.
    """

    def hidden(match: re.Match[str]) -> str:
        user, web = match["user"], match["scheme"].lower().startswith("http")
        if match["password"] is None:
            return f"{match['scheme']}://{'***' if web and user else user}@"
        if web and user and match["password"] in (":", ":x-oauth-basic"):  # a token in the user's place
            return f"{match['scheme']}://***{match['password']}@"
        return f"{match['scheme']}://{user}:***@"

    text = _QUERY.sub(r"\1***", _AUTHORITY.sub(hidden, text))
    return _HEADER.sub(r"\1***", _KEYED.sub(r"\1***", _NAMED.sub(r"\1***", text)))


def all_without_secrets(value: Any) -> Any:
    """Plain values with all texts in them so, and with *** for texts whose key says that they are secret."""
    if isinstance(value, dict):
        hidden = {key for key, inner in value.items() if isinstance(inner, str) and _KEY.search(str(key))}
        return {key: "***" if key in hidden else all_without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [all_without_secrets(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
