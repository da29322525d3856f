"""Reads environment variables and `.env`: drops Kubernetes service links and trims invisible characters.

Mounted secrets end with a line break, `docker --env-file` keeps quotation marks, editors write byte order marks, and
Kubernetes adds `<SERVICE>_PORT=tcp://…` for every service of a namespace. All variables are read through this module.
"""

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values

from worker.errors import SettingsError

_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
_LINK_NAME = re.compile(
    r"(?=\w++\Z)(?:"  # the possessive lookahead prevents quadratic backtracking
    r"\w+_SERVICE_(?:HOST|PORT(?:_\w+)?)"  # Kubernetes
    r"|\w+_PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR|START|END))?"  # Kubernetes and `docker --link`
    r"|\w+_ENV_\w+)"  # `docker --link`
)
_PORT_LINK = re.compile(r"(?:tcp|udp|sctp)://", re.IGNORECASE)
_NAME_LINK = re.compile(r"/[^/]+/[^/]+")  # `docker --link`: the name by which a container knows another one


def is_service_link(name: str, value: str) -> bool:
    """Return whether a variable describes a neighbouring service, as Kubernetes and `docker --link` set it.

    >>> is_service_link("FLOWER_PORT", "tcp://10.0.0.5:5555"), is_service_link("FLOWER_PORT", "5555")
    (True, False)
    """
    upper, value = name.upper(), value.strip()
    if upper.endswith("_NAME"):
        return _NAME_LINK.fullmatch(value) is not None
    if upper.endswith("PORT") and _PORT_LINK.match(value):
        return True
    return _LINK_NAME.fullmatch(upper) is not None


def invisible(char: str) -> bool:
    """Return whether a character is invisible: controls, zero-width characters, byte order marks, unusual spaces."""
    return char != " " and (
        unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs") or 0xFE00 <= ord(char) <= 0xFE0F
    )


def trimmed(text: str) -> str:
    """Return the text without surrounding blanks, invisible characters and one pair of quotation marks.

    >>> trimmed('\\ufeff"abc\\n" '), trimmed("it's")
    ('abc', "it's")
    """
    text = _without_blanks(text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        return _without_blanks(text[1:-1])
    return text


def clean(text: str) -> str:
    """Return the text trimmed. Raises ValueError for an invisible character inside it."""
    text = trimmed(text)
    for place, char in enumerate(text, 1):
        if invisible(char):
            raise ValueError(f"has {_described(char)} as character {place}: remove it")
    return text


def read_environment(environment: Mapping[str, str], file: Path | None) -> dict[str, str]:
    """Return the variables that are set: those of the environment, then those that are only in the file.

    Blank variables and service links count as unset. Raises SettingsError if the file cannot be read.
    """
    variables: dict[str, str] = {}
    names: set[str] = set()
    for source in (environment, {} if file is None else _file_values(file)):
        values = {_without_blanks(name): value for name, value in source.items() if not is_service_link(name, value)}
        values = {name: value for name, value in values.items() if name.upper() not in names and trimmed(value)}
        variables |= values
        names |= {name.upper() for name in values}
    return variables


def _file_values(file: Path) -> dict[str, str]:
    try:
        values = dotenv_values(file, encoding="utf-8-sig") if file.is_file() else {}
    except UnicodeDecodeError:
        raise SettingsError("the file .env in this directory is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"the file .env in this directory cannot be read ({error.strerror})") from None
    return {name: value for name, value in values.items() if value is not None}


def _without_blanks(text: str) -> str:
    begin, end = 0, len(text)
    while begin < end and (text[begin] == " " or invisible(text[begin])):
        begin += 1
    while begin < end and (text[end - 1] == " " or invisible(text[end - 1])):
        end -= 1
    return text[begin:end]


def _described(char: str) -> str:
    if char in "\r\n\u2028\u2029\x85":
        return "a line break"
    if unicodedata.category(char) == "Cs":
        return "a byte that is not UTF-8 text"
    name = unicodedata.name(char, "").lower()
    return f"an invisible character (U+{ord(char):04X}{f', {name}' if name else ''})"
