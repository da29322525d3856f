"""A small raster image, painted column by column, and its PNG encoding. Pure: no clock, no randomness, no I/O."""

import struct
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

Colour = tuple[float, float, float]
Planes = tuple[list[bytearray], list[bytearray], list[bytearray]]

_CELL_PIXELS = 10  # distance between two computed points of a smooth field
_DITHER_COPIES = 4  # copies of a ramp with different dithering, used by the columns in turn
_BAYER = (0, 48, 12, 60, 3, 51, 15, 63)  # one line of an ordered dither matrix; columns shift it


def hex_colour(text: str) -> Colour:
    """Return the colour of a text `rrggbb` as three numbers from 0 to 255."""
    return (float(int(text[0:2], 16)), float(int(text[2:4], 16)), float(int(text[4:6], 16)))


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour that is `share` of the way from the first to the second."""
    remainder = 1.0 - share
    return (
        first[0] * remainder + second[0] * share,
        first[1] * remainder + second[1] * share,
        first[2] * remainder + second[2] * share,
    )


def gradient(stops: Sequence[tuple[float, Colour]], place: float) -> Colour:
    """Return the colour at a position. Stops must be sorted by position."""
    previous, colour = stops[0]
    for stop, stop_colour in stops:
        if place <= stop:
            return mix(colour, stop_colour, (place - previous) / (stop - previous) if stop > previous else 1.0)
        previous, colour = stop, stop_colour
    return colour


@dataclass(frozen=True, slots=True)
class Ramp:
    """A colour ramp down a column: several dithered copies, each with one byte string per channel."""

    copies: tuple[tuple[bytes, bytes, bytes], ...]


def ramp(stops: Sequence[tuple[float, Colour]], length: int) -> Ramp:
    """Return a ramp of `length` pixels. The positions of its stops run from 0 to 1."""
    colours = [gradient(stops, step / max(length - 1, 1)) for step in range(length)]
    fine = [[int(colour[channel] * 64) for colour in colours] for channel in range(3)]
    copies = []
    for copy in range(_DITHER_COPIES):
        dither = [_BAYER[(step * 5 + copy * 3) & 7] for step in range(8)] * (length // 8 + 1)
        red, green, blue = (
            bytes([(value + extra) >> 6 for value, extra in zip(line, dither, strict=False)]) for line in fine
        )
        copies.append((red, green, blue))
    return Ramp(tuple(copies))


def _blend_lines(lines: Sequence[int], lanes: int, count: int) -> list[int]:
    """Return `count` lines that interpolate `lines` by a quadratic spline. A line is an integer of 32-bit parts."""
    mask = int.from_bytes(b"\xff\xff\x00\x00" * lanes, "little")
    scale = (len(lines) - 2) / count
    blended = []
    for step in range(count):
        position = (step + 0.5) * scale
        cell = min(int(position), len(lines) - 3)
        fraction = position - cell
        left_weight = int(128 * (1 - fraction) * (1 - fraction))
        right_weight = int(128 * fraction * fraction)
        total = (
            lines[cell] * left_weight
            + lines[cell + 1] * (256 - left_weight - right_weight)
            + lines[cell + 2] * right_weight
        )
        blended.append((total >> 8) & mask)
    return blended


def smooth_field(size: int, values: Callable[[float, float], Sequence[float]], channels: int) -> list[list[bytearray]]:
    """Return the dithered columns of a smooth picture, one list per channel.

    `values(x, y)` is only computed on a coarse grid, with coordinates from 0 to 1, and returns numbers from 0 to 255.
    The rest is interpolated many pixels at a time: a line is one big integer, so Python's integer arithmetic does the
    loop.
    """
    cells = max(size // _CELL_PIXELS, 4) + 2
    grid = [[values((gx - 0.5) / (cells - 2), (gy - 0.5) / (cells - 2)) for gx in range(cells)] for gy in range(cells)]
    dithers = [
        int.from_bytes(b"".join(bytes((_BAYER[(y * 5 + x * 3) & 7] * 4, 0, 0, 0)) for y in range(size)), "little")
        for x in range(8)
    ]
    planes = []
    for channel in range(channels):
        rows = [_lanes([point[channel] for point in row]) for row in grid]
        stretched = b"".join(line.to_bytes(cells * 4, "little") for line in _blend_lines(rows, cells, size))
        flat = array("I", stretched)
        columns = [int.from_bytes(flat[gx::cells].tobytes(), "little") for gx in range(cells)]
        planes.append(
            [
                bytearray((line + dithers[x & 7]).to_bytes(size * 4, "little")[1::4])
                for x, line in enumerate(_blend_lines(columns, size, size))
            ]
        )
    return planes


def _lanes(values: Sequence[float]) -> int:
    lanes = [int(min(254.9, max(0.0, value)) * 256) for value in values]
    return int.from_bytes(struct.pack(f"<{len(lanes)}I", *lanes), "little")


class Canvas:
    """A square picture. Coordinates are in pixels from the top left."""

    __slots__ = ("planes", "size")

    def __init__(self, size: int, planes: Planes) -> None:
        self.size = size
        self.planes = planes

    def fill_below(self, edge: Sequence[float], paint: Ramp) -> None:
        """Paint everything below an edge with one height per column. The ramp starts at the edge."""
        for x, height in enumerate(edge):
            first = max(ceil(height), 0)
            if first >= self.size:
                continue
            cover = first - height
            for plane, line in zip(self.planes, paint.copies[x % _DITHER_COPIES], strict=True):
                column = plane[x]
                column[first:] = line[: self.size - first]
                if first and 0 < cover < 1:
                    column[first - 1] = int(column[first - 1] * (1 - cover) + line[0] * cover)

    def dot(self, x: int, y: int, colour: Colour, share: float) -> None:
        """Mix one pixel with a colour. Points outside the picture are ignored."""
        if 0 <= x < self.size and 0 <= y < self.size:
            remainder = 1.0 - share
            for plane, value in zip(self.planes, colour, strict=True):
                column = plane[x]
                column[y] = int(column[y] * remainder + value * share)

    def streak(self, centre: float, y: int, half: float, colour: Colour, share: float) -> None:
        """Draw a horizontal stroke that fades at both ends."""
        if half < 0.5:
            self.dot(int(centre), y, colour, share * half * 2)
            return
        for x in range(int(centre - half), int(centre + half) + 1):
            fade = 1.0 - abs(x - centre) / half
            if fade > 0:
                self.dot(x, y, colour, share * min(1.0, fade * 2))

    def disc(self, cx: float, cy: float, radius: float, colour: Colour, share: float = 1.0) -> None:
        """Draw a filled circle with a soft edge."""
        for x in range(max(0, int(cx - radius - 1)), min(self.size, int(cx + radius + 2))):
            chord = radius * radius - (x - cx) * (x - cx)
            if chord <= 0:
                continue
            half = sqrt(chord)
            self.vertical(x, cy - half, cy + half, colour, share)

    def vertical(self, x: int, top: float, bottom: float, colour: Colour, share: float = 1.0) -> None:
        """Mix a vertical run of one column with a colour. Its lower end is antialiased and at least part of a pixel."""
        if not 0 <= x < self.size:
            return
        first, last = max(ceil(top), 0), min(int(bottom), self.size)
        for plane, value in zip(self.planes, colour, strict=True):
            column = plane[x]
            column[first:last] = bytes([int(value * (1 - share) + value * share) for value in column[first:last]])
        self.dot(x, last, colour, share * min(1.0, max(0.0, bottom - max(last, top))))

    def mirror(self, line: int, tint: Colour, share: float) -> None:
        """Replace everything below `line` with a tinted reflection of the part above it."""
        depth = self.size - line
        for plane, value in zip(self.planes, tint, strict=True):
            table = bytes([int(value * (1 - share) + value * share) for value in range(256)])
            for column in plane:
                column[line:] = column[max(0, line - depth) : line][::-1].translate(table).ljust(depth, column[:1])

    def png(self) -> bytes:
        """Return the picture as a true-colour PNG file."""
        size = self.size
        flat = [b"".join(plane) for plane in self.planes]
        packer = zlib.compressobj(2)
        parts = []
        line = bytearray(size * 3 + 1)
        for y in range(size):
            for channel in range(3):
                line[channel + 1 :: 3] = flat[channel][y::size]
            parts.append(packer.compress(line))
        parts.append(packer.flush())
        header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(parts)) + _chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
