"""The kind of media that a link names by its extension, and whether a fresh link can be of the same output."""

from worker.core.media.text import extension_of

_KINDS = {
    "picture": "png apng jpg jpeg jpe jfif webp gif avif heic heif bmp tif tiff ico svg",
    "video": "mp4 m4v mov webm mkv avi mpg mpeg ogv gif",
    "audio": "mp3 mpga wav wave flac ogg oga opus m4a aac wma weba",
    "model": "glb gltf obj ply stl fbx usd usdz",
    "text": "txt text json",
    "subtitles": "txt text json srt vtt",
    "weights": "safetensors ckpt",
}


def kinds_of(link: str) -> frozenset[str]:
    """Return the kinds of media that a link may lead to, by its extension. None at all: it does not say.

    >>> sorted(kinds_of("https://h/a.wav?x=b.png")), sorted(kinds_of("https://h/a.gif")), sorted(kinds_of("https://h/a"))
    (['audio'], ['picture', 'video'], [])
    """
    return _BY_EXTENSION.get(extension_of(link), frozenset())


def may_replace(fresh: str, link: str) -> bool:
    """Return whether a fresh link can be of the output that `link` was listed for.

    Ids repeat between the families of the API, so an answer may list somebody else's outputs. A picture where a sound
    was listed is such a case. A link without an extension, or with one that names no kind, says nothing.

    >>> may_replace("https://h/b.mp3", "https://h/a.wav"), may_replace("https://h/b.png", "https://h/a.wav")
    (True, False)
    """
    before, after = kinds_of(link), kinds_of(fresh)
    return not before or not after or bool(before & after)


_BY_EXTENSION = {
    extension: frozenset(kind for kind, names in _KINDS.items() if extension in names.split())
    for names in _KINDS.values()
    for extension in names.split()
}
