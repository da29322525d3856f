"""Random links and contents: file names are made by the worker, and a file is complete or does not exist."""

import base64
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import delete, insert

from tests.core.test_media_signatures import HTML, KINDS, STARTS, UNITS, WHOLE
from tests.download_stand import Stand
from tests.fuzz.effort import EFFORTS, with_effort
from tests.fuzz.urls import urls
from tests.rows import read_output
from tests.s3_servers import S3Server
from worker.client import jobs as client_jobs
from worker.client.connection import loaded_settings
from worker.core.media.base64_text import base64_start
from worker.core.media.signatures import HEAD_BYTES, TAIL_BYTES, Media, is_complete, pixel_count, sniff
from worker.core.reply import MAX_URL
from worker.sandbox.pictures import draw as drawn
from worker.storage.local import FileStorage, path_of
from worker.storage.partial_files import PartialFiles
from worker.storage.s3 import S3Storage
from worker.store.engine import database_now
from worker.store.schema import bodies, jobs, outputs

SOME_SECONDS = 0.5  # of CPU time; each call takes milliseconds
SOME_BYTES = 24 * HEAD_BYTES  # of memory, for inputs of one kilobyte to four times the largest head
EXTENSIONS = {
    "png", "jpg", "gif", "mp3", "flac", "ogg", "glb", "zip", "webm", "mkv", "webp", "wav", "avi", "avif", "heic", "mp4",
    "mov", "m4a", "obj", "ply", "stl",
}  # fmt: skip
NAME = re.compile(r"[0-9]+/[0-9]+/[0-9]+-[0-9a-f]{16}(?:[0-9a-f]{48})?\.([a-z0-9]{3,4})")
PICTURES = [*STARTS, drawn("a lake at dawn", "1", 0, 64)]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a real file, or two in one, with changed, inserted or removed bytes."""
    body = draw(st.sampled_from(PICTURES))
    if draw(st.integers(0, 3)) == 0:
        body += draw(st.sampled_from([*PICTURES, HTML, b"<script>alert(1)</script>", b"#!/bin/sh\n", b"PK\x05\x06"]))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(body) - 1, 0)))
        piece = draw(st.binary(max_size=4) | st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x01"]))
        match draw(st.integers(0, 2)):
            case 0:
                body = body[:at] + piece + body[at + len(piece) :]
            case 1:
                body = body[:at] + piece + body[at:]
            case _:
                body = body[:at]
    return base64.b64encode(body) if draw(st.integers(0, 5)) == 0 else body


FILES = st.one_of(mutated(), mutated(), st.sampled_from(PICTURES), st.binary(max_size=100), st.just(HTML))
LINKS = st.one_of(
    urls(), st.text(max_size=40), st.sampled_from(["../../../etc/x.sh", "data:text/html,x", "a.php\x00.png"])
)


def decoded(body: bytes) -> bytes:
    """Return the bytes of a body in base64, with or without `data:…,` and quotes, in either alphabet."""
    text = body.strip(b'"').rpartition(b",")[2].translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(text + b"==")


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@EFFORTS
def test_any_link_and_bytes_give_a_complete_file_with_a_safe_name(
    stand: Stand, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.out = tmp_path / "my 100% Bilder ü#?;"
    downloader = stand.downloader()
    monkeypatch.setenv("DATABASE_URL", str(stand.engine.url))
    loaded_settings.cache_clear()

    @with_effort(examples, of=4)
    @given(link=LINKS, body=FILES)
    def check(link: str, body: bytes) -> None:
        url = f"data:{link.encode('utf-8', 'replace').decode().replace(chr(0), ' ')[:MAX_URL]}"
        with stand.engine.begin() as connection:
            for table in (bodies, outputs, jobs):
                connection.execute(delete(table))
            now = database_now(connection)
        output_id = stand.add(url, due_at=now, listed_at=now, position=3)
        with stand.engine.begin() as connection:
            connection.execute(insert(bodies).values(output_id=output_id, body=body))

        downloader.run(output_id)

        row = read_output(stand.engine, output_id)
        if row.status != "stored":
            assert stand.files == []
            assert row.error_code in ("not_media", "truncated", "too_large")
            return
        [file] = stand.files
        assert path_of(row.location) == file
        assert row.location.isascii()
        assert not set(" #?;") & set(row.location)
        match = NAME.fullmatch(file.relative_to(stand.out).as_posix())
        assert match is not None
        assert match[1] in EXTENSIONS
        content = file.read_bytes()
        media = sniff(content[:HEAD_BYTES])
        assert media == Media(row.media_type, match[1])
        assert content == body or content == decoded(body)
        assert not content.lstrip().lower().startswith((b"<", b"#!"))
        assert (row.size_bytes, file.stat().st_mode & 0o111) == (len(content), 0)
        with client_jobs.open_output(output_id) as opened:
            assert opened.read() == content
        file.unlink()

    check()


_PARTS = st.text(
    alphabet=st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)


@EFFORTS
def test_locations_in_any_directory_lead_back_to_the_bytes(examples: int, tmp_path: Path) -> None:
    tries = iter(range(10**9))

    @with_effort(examples, of=4)
    @given(place=_PARTS, job_id=st.integers(1, 2**63 - 1), position=st.integers(0, 1_000), body=st.binary(max_size=50))
    @example("%2e%2e", 1, 0, b"x")
    @example("%", 999, 0, b"")
    @example("a%2Fb", 1_000, 1, b"y")
    def check(place: str, job_id: int, position: int, body: bytes) -> None:
        storage = FileStorage(tmp_path / str(next(tries)) / place)
        storage.prepare()
        with storage.partials.receive(1, "t") as incoming:
            incoming.write(body)
            location = storage.keep(incoming, job_id=job_id, position=position, media=Media("image/png", "png"))
            digest = incoming.sha256

        assert location.isascii()
        with storage.open(location) as file:
            assert file.read() == body
        assert list(storage.locations()) == [location]
        assert storage.examine(location, size=len(body), sha256=digest) == "whole"
        assert path_of(location).is_relative_to(tmp_path)

    check()


@pytest.mark.server
@EFFORTS
def test_locations_in_s3_with_any_prefix_lead_back_to_the_bytes(
    examples: int, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket, tries = s3.bucket(), iter(range(10**9))
    partials = PartialFiles(tmp_path / "partial")
    partials.folder.mkdir()
    odd = st.text(alphabet="aZ09 %+&=#?;:@~'()*!$,_.-éü漢\U0001f600", min_size=1, max_size=12).filter(
        lambda name: name.strip(". ") == name
    )

    @with_effort(examples, of=60)
    @given(place=odd, job_id=st.integers(1, 2**63 - 1), body=st.binary(min_size=1, max_size=50))
    @example("100%25", 1, b"x")
    @example("a+b %2F", 1, b"x")
    def check(place: str, job_id: int, body: bytes) -> None:
        prefix = f"{next(tries)}/{place}"
        storage = S3Storage(bucket, prefix, partials)
        with partials.receive(1, "t") as incoming:
            incoming.write(body)
            location = storage.keep(incoming, job_id=job_id, position=0, media=Media("image/png", "png"))

        assert NAME.fullmatch(location.removeprefix(f"s3://{bucket}/{prefix}/"))
        with storage.open(location) as file:
            assert file.read() == body
        assert list(storage.locations()) == [location]

    check()


# ── what bytes are ────────────────────────────────────────────────────────────────────────────────────────────────────


@EFFORTS
def test_no_bytes_break_or_delay_the_media_parsers(examples: int) -> None:
    @with_effort(examples)
    @given(body=mutated() | st.binary(max_size=200), kind=st.sampled_from(KINDS), size=st.integers(0, 2**40))
    def check(body: bytes, kind: Media, size: int) -> None:
        began = time.thread_time()
        head, tail = body[:HEAD_BYTES], body[-TAIL_BYTES:]

        media = sniff(head)
        base64_start(head)
        for media_type in (media, kind):
            if media_type is not None:
                assert isinstance(is_complete(media_type, head, tail, max(size, len(body))), bool)
                area = pixel_count(media_type, head)
                assert area is None or area >= 0
        if media is not None:
            assert media.extension in EXTENSIONS
            assert not body.lstrip().lower().startswith((b"<!doctype", b"<html", b"<svg", b"<script"))
            assert is_complete(media, head, tail, len(body)) in (True, False)

        assert time.thread_time() - began < SOME_SECONDS

    check()


@EFFORTS
def test_repeated_bytes_need_little_time_and_memory(examples: int) -> None:
    starts = st.sampled_from([b"", *PICTURES, *UNITS])
    parts = st.one_of(st.sampled_from(UNITS), mutated(), st.binary(min_size=1, max_size=12)).filter(bool)

    @with_effort(examples, of=10)
    @given(start=starts, part=parts, end=st.binary(max_size=8), kind=st.sampled_from(KINDS))
    def check(start: bytes, part: bytes, end: bytes, kind: Media) -> None:
        head = (start + part * (HEAD_BYTES // len(part) + 1))[: HEAD_BYTES - len(end)] + end
        began = time.thread_time()

        media = sniff(head)
        base64_start(head)
        for media_type in {kind, media} - {None}:
            assert media_type is not None
            is_complete(media_type, head, head, len(head))
            pixel_count(media_type, head)

        assert time.thread_time() - began < 2 * SOME_SECONDS

    check()


def test_parsing_needs_little_memory() -> None:
    """For every format, up to the number of bytes that is read."""
    for body in [*WHOLE.values(), *PICTURES]:
        head = (body * (HEAD_BYTES // len(body) + 1))[:HEAD_BYTES]
        tracemalloc.start()
        try:
            media = sniff(head)
            base64_start(head)
            if media is not None:
                is_complete(media, head, head, 10**9)
                pixel_count(media, head)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < SOME_BYTES
