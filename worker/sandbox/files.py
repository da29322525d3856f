"""Outputs of jobs: small, valid files of each kind, computed from the job. Pure: the same job gives the same bytes."""

import base64
import json
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from math import pi, sin
from typing import NamedTuple

from worker.sandbox.pictures import MIN_SIZE, draw

MAX_CACHED_FILES = 64
SAMPLE_RATE = 8_000  # sound samples per second
FRAMES = 4  # of a video, one per half second
FRAME_SIZE = 64  # width and height of a video in pixels
WITH_TIMES = "words.txt"  # name ending of a transcript with times: JSON in a file named like a text


class OutputFile(NamedTuple):
    """The bytes of an output, and its media type."""

    content: bytes
    media_type: str


def make_output(name: str, prompt: str, job_id: str, index: int, size: int) -> OutputFile:
    """Return the output for a file name. Its extension is the kind. `size` is the width of pictures in pixels."""
    media_type, produce = _KINDS[WITH_TIMES if name.endswith(WITH_TIMES) else name.rpartition(".")[2]]
    return OutputFile(produce(prompt, job_id, index, size), media_type)


class OutputCache:
    """Makes outputs and keeps the latest ones. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # one at a time: drawing is computation, so a second thread is not faster
        self._files: OrderedDict[tuple[str, int], OutputFile] = OrderedDict()

    def get(self, name: str, prompt: str, job_id: str, index: int, size: int) -> OutputFile:
        """Return the output for a file name, as `make_output` does."""
        with self._lock:
            file = self._files.pop((name, size), None) or make_output(name, prompt, job_id, index, size)
            self._files[name, size] = file
            if len(self._files) > MAX_CACHED_FILES:
                self._files.popitem(last=False)
        return file


def file_name(*parts: object, index: int, extension: str) -> str:
    """Return a file name like the real ones: the index, then hex digits. It depends only on the parts."""
    digest = sha256("|".join(map(str, (*parts, index))).encode()).hexdigest()
    return f"{index}-{digest[:8]}-{digest[8:12]}-4{digest[13:16]}-a{digest[17:20]}-{digest[20:32]}.{extension}"


def wav(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return a quarter of a second of two tones, 16 bit, mono."""
    low = 220 + sha256(f"{prompt}|{job_id}|{index}".encode("utf-8", "replace")).digest()[0]
    count = SAMPLE_RATE // 4
    samples = []
    for place in range(count):
        angle, fade = 2 * pi * place / SAMPLE_RATE, 1 - place / count
        samples.append(int(fade * (9_000 * sin(angle * low) + 6_000 * sin(angle * low * 1.5))))
    sound = struct.pack(f"<{count}h", *samples)
    form = struct.pack("<HHIIHH", 1, 1, SAMPLE_RATE, SAMPLE_RATE * 2, 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(sound)) + sound
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def mp4(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return a video of four PNG frames in MPEG-4 boxes, which common players can show."""
    edge = max(MIN_SIZE, min(size, FRAME_SIZE))
    frames = [draw(prompt, job_id, index * FRAMES + number, edge) for number in range(FRAMES)]
    ticks, each = 1_000, 500
    first = _box("ftyp", b"isom\0\0\2\0isomiso2mp41")
    start = len(first) + 8
    starts = [start + sum(map(len, frames[:number])) for number in range(FRAMES)]
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    decoder = b"\x04\x0d\x6d\x11" + bytes(11)  # 6D: frames are PNG
    stream = b"\x03\x15\0\1\0" + decoder + b"\x06\x01\x02"
    entry = bytes(6) + b"\0\1" + bytes(16) + struct.pack(">HHIIIH", edge, edge, 72 << 16, 72 << 16, 0, 1)
    entry += bytes(32) + struct.pack(">Hh", 24, -1) + _full("esds", stream)
    table = _full("stsd", _count([_box("mp4v", entry)]))
    table += _full("stts", struct.pack(">III", 1, FRAMES, each))
    table += _full("stsc", struct.pack(">IIII", 1, 1, 1, 1))
    table += _full("stsz", struct.pack(f">II{FRAMES}I", 0, FRAMES, *map(len, frames)))
    table += _full("stco", struct.pack(f">I{FRAMES}I", FRAMES, *starts))
    place = _box("dinf", _full("dref", _count([_full("url ", b"", flags=1)])))
    inside = _box("minf", _full("vmhd", bytes(8), flags=1) + place + _box("stbl", table))
    length = FRAMES * each
    header = _full("mdhd", struct.pack(">IIIIHH", 0, 0, ticks, length, 0x55C4, 0))
    handler = _full("hdlr", bytes(4) + b"vide" + bytes(12) + b"stand-in\0")
    track = _full("tkhd", struct.pack(">IIIII", 0, 0, 1, 0, length) + bytes(16) + matrix
                  + struct.pack(">II", edge << 16, edge << 16), flags=3)  # fmt: skip
    movie = _full("mvhd", struct.pack(">IIIIIH", 0, 0, ticks, length, 0x10000, 0x100) + bytes(10) + matrix + bytes(24)
                  + struct.pack(">I", 2))  # fmt: skip
    tree = _box("moov", movie + _box("trak", track + _box("mdia", header + handler + inside)))
    return first + _box("mdat", b"".join(frames)) + tree


def glb(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return a pyramid as binary glTF 2.0."""
    apex = 0.5 + sha256(f"{prompt}|{job_id}|{index}".encode("utf-8", "replace")).digest()[0] / 255
    corners = ((-1.0, 0.0, -1.0), (1.0, 0.0, -1.0), (1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (0.0, apex, 0.0))
    faces = (0, 1, 2, 0, 2, 3, 1, 0, 4, 2, 1, 4, 3, 2, 4, 0, 3, 4)
    points = b"".join(struct.pack("<3f", *corner) for corner in corners)
    body = points + struct.pack(f"<{len(faces)}H", *faces)
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": len(points)},
             {"buffer": 0, "byteOffset": len(points), "byteLength": len(body) - len(points)}]  # fmt: skip
    accessors = [
        {"bufferView": 0, "componentType": 5126, "count": len(corners), "type": "VEC3", "min": [-1.0, 0.0, -1.0],
         "max": [1.0, apex, 1.0]},
        {"bufferView": 1, "componentType": 5123, "count": len(faces), "type": "SCALAR"},
    ]  # fmt: skip
    scene = {
        "asset": {"version": "2.0", "generator": "stand-in"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(body)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(scene, separators=(",", ":")).encode()
    chunks = b"".join(
        struct.pack("<I", len(data)) + kind + data
        for kind, data in ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", body + bytes(-len(body) % 4)))
    )
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def txt(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return the prompt as a transcript."""
    return f"{_clean_prompt(prompt)}\n".encode()


def word_times(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return the words of the prompt with times, as JSON."""
    words = [{"word": word, "start": place * 0.5, "end": place * 0.5 + 0.4} for place, word in _words(prompt)]
    return json.dumps([{"text": _clean_prompt(prompt), "words": words}], ensure_ascii=False).encode()


def chat(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return the answer of a chat as JSON."""
    message = {"role": "assistant", "content": f"The stand-in heard: {_clean_prompt(prompt)}"}
    return json.dumps({"id": job_id, "choices": [{"index": 0, "message": message}]}, ensure_ascii=False).encode()


def srt(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return SubRip captions with one word each."""
    lines = [
        f"{place + 1}\n{_time(place, ',')} --> {_time(place + 1, ',')}\n{word}\n" for place, word in _words(prompt)
    ]
    return "\n".join(lines).encode()


def vtt(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return WebVTT captions with one word each."""
    lines = [f"{_time(place, '.')} --> {_time(place + 1, '.')}\n{word}\n" for place, word in _words(prompt)]
    return "\n".join(["WEBVTT\n", *lines]).encode()


def base64_text(prompt: str, job_id: str, index: int, size: int) -> bytes:
    """Return a picture as base64 text."""
    return base64.b64encode(draw(prompt, job_id, index, size))


_KINDS: Mapping[str, tuple[str, Callable[[str, str, int, int], bytes]]] = {
    "png": ("image/png", draw),
    "wav": ("audio/wav", wav),
    "mp4": ("video/mp4", mp4),
    "glb": ("model/gltf-binary", glb),
    "txt": ("text/plain", txt),
    WITH_TIMES: ("text/plain", word_times),
    "json": ("application/json", chat),
    "srt": ("application/x-subrip", srt),
    "vtt": ("text/vtt", vtt),
    "base64": ("text/plain", base64_text),
}


def _clean_prompt(prompt: str) -> str:
    """Return the prompt as valid UTF-8 text. A prompt from JSON may contain a lone surrogate."""
    return " ".join(prompt.encode("utf-8", "replace").decode().split()) or "Nothing was said"


def _words(prompt: str) -> enumerate[str]:
    return enumerate(_clean_prompt(prompt).split()[:200])


def _time(seconds: int, point: str) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}000"


def _box(kind: str, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind.encode("ascii") + content


def _full(kind: str, content: bytes, *, flags: int = 0) -> bytes:
    """Return a box with version 0 and flags."""
    return _box(kind, struct.pack(">I", flags) + content)


def _count(boxes: list[bytes]) -> bytes:
    return struct.pack(">I", len(boxes)) + b"".join(boxes)
