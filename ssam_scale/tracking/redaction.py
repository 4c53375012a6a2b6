"""Passwords and tokens kept out of what other people read: tags, parameters, messages."""

from __future__ import annotations

import re

_AUTHORITY = re.compile(
    r"(?P<scheme>\w[\w+.-]*)://(?P<user>[^\s/:'\"]*?)(?P<password>:[^\s/'\"]*)?@(?=[^\s/@'\"]*(?:[/\s'\"]|$))"
)
_QUERY = re.compile(r"(?i)([?&][\w.-]*(?:passw|pwd|token|secret|key|sig|credential)[\w.-]*=)[^&\s'\"]+")


def without_secrets(text: str) -> str:
    """A text, such as a URI or a command line, with *** in the place of passwords and tokens of URLs.

    That is what stands between a user's name and the host, a lone name before a web server (a token), and parameters of
    a query that are called so.
    """

    def hidden(match: re.Match[str]) -> str:
        user, web = match["user"], match["scheme"].lower().startswith("http")
        if match["password"] is None:
            return f"{match['scheme']}://{'***' if web and user else user}@"
        return f"{match['scheme']}://{user}:***@"

    return _QUERY.sub(r"\1***", _AUTHORITY.sub(hidden, text))
