"""The kind of media of a link, from its extension, and whether a fresh link can belong to the same output."""

import re
from itertools import chain
from urllib.parse import unquote, urlsplit

_PACKED = re.compile(r"\.(?:gz|gzip|zst|br)$", re.IGNORECASE)
_EXTENSION = re.compile(r"[^/]\.([A-Za-z0-9]{1,16})$")
_NAMES = {
    "picture": "png apng jpg jpeg jpe jfif webp gif avif heic heif bmp tif tiff ico svg",
    "video": "mp4 m4v mov webm mkv avi mpg mpeg ogv gif",
    "audio": "mp3 mpga wav wave flac ogg oga opus m4a aac wma weba",
    "model": "glb gltf obj ply stl fbx usd usdz",
    "text": "txt text json",
    "subtitles": "txt text json srt vtt",
    "weights": "safetensors ckpt",
}
EXTENSIONS = {kind: frozenset(names.split()) for kind, names in _NAMES.items()}
_BY_EXTENSION = {
    extension: frozenset(kind for kind, extensions in EXTENSIONS.items() if extension in extensions)
    for extension in chain.from_iterable(EXTENSIONS.values())
}


def extension_of(address: str) -> str:
    """Return the extension of a URL's path in lower case, without a compression suffix, or "".

    >>> extension_of("https://h/a/B.JSON.gz?x=1.png"), extension_of("https://h.txt/a"), extension_of("https://h/.txt")
    ('json', '', '')
    """
    try:
        path = unquote(urlsplit(address).path)
    except ValueError:
        return ""
    match = _EXTENSION.search(_PACKED.sub("", path.rstrip()))
    return match[1].lower() if match else ""


def kinds_of(link: str) -> frozenset[str]:
    """Return the possible kinds of media of a link, from its extension. The result is empty if they are unknown.

    >>> sorted(kinds_of("https://h/a.wav?x=b.png")), sorted(kinds_of("https://h/a.gif")), sorted(kinds_of("https://h/a"))
    (['audio'], ['picture', 'video'], [])
    """
    return _BY_EXTENSION.get(extension_of(link), frozenset())


def may_replace(fresh: str, link: str) -> bool:
    """Return whether a fresh link can belong to the same output as `link`.

    The families of the API use the same ids, so an answer may list the outputs of another job: for example a picture
    instead of a sound. A link without a known extension is always accepted.

    >>> may_replace("https://h/b.mp3", "https://h/a.wav"), may_replace("https://h/b.png", "https://h/a.wav")
    (True, False)
    """
    before, after = kinds_of(link), kinds_of(fresh)
    return not before or not after or bool(before & after)
