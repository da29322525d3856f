"""The kind of media of a link, from its extension, and whether a fresh link can belong to the same output."""

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


_BY_EXTENSION = {
    extension: frozenset(kind for kind, names in _KINDS.items() if extension in names.split())
    for names in _KINDS.values()
    for extension in names.split()
}
