"""Make external text safe to store and show: without NUL, lone surrogates and control characters."""

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")


def plain_text(text: str) -> str:
    r"""Return `text` in a form that every database accepts, with the same length.

    >>> plain_text("a\x00b\ud800")
    'a b?'
    """
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROLS)
