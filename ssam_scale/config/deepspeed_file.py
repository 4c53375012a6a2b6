"""A configuration file of DeepSpeed's: JSON as DeepSpeed reads it, and the line of each of its keys."""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from ssam_scale.config.section import KeyPath
from ssam_scale.config.yaml_lines import parse, text_of
from ssam_scale.errors import UserError

# What DeepSpeed also takes, by Hjson: comments. Texts come first, so that nothing inside of one is taken for one.
_PIECES = re.compile(r'(?P<text>"(?:\\.|[^"\\])*")|(?P<comment>//[^\n]*|#[^\n]*|/\*.*?\*/)|(?P<word>-?\b(?:NaN|Infinity)\b)', re.S)  # fmt: skip  # noqa: E501


def read_deepspeed(given: str) -> tuple[dict[str, Any], dict[KeyPath, int], str]:
    """The sections of a configuration of DeepSpeed's, the line of each key, and what to call the file in errors.

    Args:
        given: a path, or as DeepSpeed takes it too, the JSON itself in URL-safe base64.

    Raises:
        UserError: it is not a JSON object of unique keys and finite numbers.
    """
    text, where = _text(given)
    text = _PIECES.sub(lambda match: _without_comment(match, where), text)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: not a configuration: it is nested too deeply") from None
    except ValueError:  # Python converts no number of more than 4,300 digits
        raise UserError(f"{where}: not a configuration: a number in it is thousands of digits long") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: a configuration of DeepSpeed's is an object with keys, this is {text.strip()[:60]}")
    _, lines = parse(text.replace("\t", " "), where)  # JSON is YAML but for its tabs
    return values, lines, where


def _text(given: str) -> tuple[str, str]:
    path = Path(given)
    try:
        return text_of(path, "utf-8-sig"), given
    except UnicodeDecodeError as error:
        raise UserError(f"{given}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        if (decoded := _decoded(given)) is not None:
            return decoded, "--deepspeed_config"
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise UserError(f"--deepspeed_config {given[:200]}: {reason}") from None


def _decoded(given: str) -> str | None:
    """The JSON object that `given` is in base64, if it is."""
    try:
        text = base64.b64decode(given, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _without_comment(match: re.Match[str], where: str) -> str:
    """Spaces in the place of a comment, so that what stands behind it stays where it is."""
    if match["word"]:
        line = match.string.count("\n", 0, match.start()) + 1
        raise UserError(f"{where}:{line}: {match['word']} is not a number that JSON knows")
    return match["text"] or re.sub(r"[^\n]", " ", match[0])
