"""Text from outside made fit to be stored and shown: no NUL, no lone surrogate, no control characters."""

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")


def plain_text(text: str) -> str:
    r"""`text` as any database takes it, of the same length.

    >>> plain_text("a\x00b\ud800")
    'a b?'
    """
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS)
