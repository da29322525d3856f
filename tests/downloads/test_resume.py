"""Transfers that break: what came is gone on with where the server allows, and never mixed with anything else."""

import base64
import errno
import fcntl
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from sqlalchemy import update

from tests.download_stand import Stand, png
from tests.rows import read_output
from tests.web import Picture, Web, drips, head, page, sends, web_server
from worker.core.lifecycle import Attempt
from worker.core.media.signatures import Media
from worker.downloads import downloader as downloads
from worker.downloads.downloader import HostSlots
from worker.errors import StorageTrouble
from worker.storage.local import PARTIAL, FileStorage, path_of
from worker.storage.partial_files import Incoming, PartialFiles, Source, link_hash
from worker.store.claims import claim_holders
from worker.store.reaper import release_crashed
from worker.store.schema import outputs
from worker.system.process_identity import dead_holders

BODY = png(padding=600_000)
TAG = '"v1"'


@pytest.fixture
def picture(web: Web) -> Picture:
    """At `/a.png`."""
    made = Picture(web, BODY, headers={"ETag": TAG})
    web.serves("/a.png", made)
    return made


def _again(stand: Stand, output_id: int) -> Any:
    """One more attempt, as if its time had come; the row."""
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).where(outputs.c.id == output_id).values(due_at=outputs.c.listed_at))
    stand.downloader().run(output_id)
    return read_output(stand.engine, output_id)


def _is_stored(stand: Stand, row: Any, body: bytes = BODY) -> bool:
    assert (row.status, row.error_code) == ("stored", None), row.error_message
    assert row.sha256 == hashlib.sha256(body).hexdigest()
    assert path_of(row.location).read_bytes() == body
    assert stand.files == [path_of(row.location)]
    return True


# ── one attempt ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_a_transfer_that_breaks_five_times_is_gone_on_with(
    seed: int,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """At random places: it ends identical, in one attempt, and hardly a byte comes twice."""
    draw = random.Random(seed)
    picture.cuts = [draw.randrange(1, len(BODY) // 6) for _ in range(5)]
    row = stand.download(web.url + "/a.png")
    assert _is_stored(stand, row)
    assert (row.attempts, len(web.asked)) == (1, 6)
    assert picture.sent < 1.2 * len(BODY)
    assert all(asked.headers["if-range"] == TAG for asked in web.asked[1:])


def test_without_ranges_a_transfer_that_breaks_five_times_starts_over_each_time(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """It ends identical all the same, and in one attempt."""
    picture.ranges = False
    picture.cuts = [400_000, 100, 300_000, 5_000, 500_000]
    row = stand.download(web.url + "/a.png")
    assert _is_stored(stand, row)
    assert (row.attempts, len(web.asked)) == (1, 6)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"ETag": 'W/"v1"'},
        {"ETag": "v1"},
        {"ETag": TAG, "Accept-Ranges": "none"},
        {"Last-Modified": "Tue, 24 Nov 2026 10:00:00 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"},
        {"Last-Modified": "soon", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"},
    ],
    ids=["nothing", "weak", "unquoted", "no ranges", "changed just now", "no date"],
)
def test_what_can_not_be_told_from_another_version_is_never_gone_on_with(
    headers: dict[str, str],
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """It starts over."""
    picture.headers, picture.cuts = headers, [1_000, 2_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    assert picture.spans == ["", "", ""]


def test_the_date_of_the_last_change_will_do_where_it_is_sure(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """A second before the answer, at least."""
    picture.headers = {"Last-Modified": "Tue, 24 Nov 2026 09:59:59 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"}
    picture.cuts = [1_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    assert picture.spans == ["", "bytes=1000-"]


def test_a_file_that_has_changed_meanwhile_is_taken_from_its_start(
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """The rest of the new one does not follow the beginning of the old one."""
    picture.cuts = [100_000]
    other = png(padding=500_000)

    def changes(client: socket.socket) -> None:
        picture(client)
        picture.body, picture.headers = other, {"ETag": '"v2"'}

    assert _is_stored(stand, stand.download(web.serves("/a.png", changes)), other)


@pytest.mark.parametrize(
    "span",
    [
        None,
        "bytes 0-{last}/{whole}",
        "bytes 99999-{last}/{whole}",
        "bytes 100000-{last}/700000",
        "bytes */{whole}",
        "items 100000-{last}/{whole}",
    ],
)
def test_a_partial_answer_that_is_not_the_rest_is_thrown_away(
    span: str | None,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """The wrong place, the wrong length, none at all: from the start, then."""
    picture.cuts = [100_000]
    told = {} if span is None else {"Content-Range": span.format(last=len(BODY) - 1, whole=len(BODY))}

    def lies(client: socket.socket) -> None:
        if web.asked[-1].headers.get("range"):
            page(206, BODY[100_000:], ETag=TAG, **told)(client)
        else:
            picture(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", lies)))
    assert len(web.asked) == 3


@pytest.mark.parametrize(
    "answer",
    [
        page(416, b"", Content_Range="bytes */7"),
        page(400, b"no ranges here"),
        page(501, b""),
        page(206, BODY[100_000:], ETag='"v2"', Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"),
        page(206, b"x" * 9, Content_Encoding="gzip", Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"),
        page(206, b"--x\r\n", Content_Type="multipart/byteranges; boundary=x"),
    ],
    ids=["not satisfiable", "bad request", "not implemented", "another version", "packed", "several parts"],
)
def test_a_server_that_can_not_go_on_is_asked_for_all_of_it(
    answer: Callable[[socket.socket], None],
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """Once more, without a range."""
    picture.cuts = [100_000]

    def odd(client: socket.socket) -> None:
        (answer if web.asked[-1].headers.get("range") else picture)(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", odd)))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_cut_at_its_source_is_not_asked_for_again_and_again(
    ranges: bool,
    stand: Stand,
    web: Web,
    picture: Picture,
) -> None:
    """Twice at the same place tells; three attempts end it, as the contract says."""
    picture.ranges = ranges
    cut = picture.body[:5_000]
    picture.body = BODY

    def short(client: socket.socket) -> None:
        start = 5_000 if ranges and web.asked[-1].headers.get("range") else 0
        span = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
        length = str(len(BODY) - start)
        sends(head(206 if start else 200, ETag=TAG, Content_Length=length, **span), cut[start:])(client)

    row = stand.download(web.serves("/a.png", short), listed_at=datetime.now(UTC) - timedelta(minutes=2))
    assert (row.status, row.error_code, row.bad_bodies, len(web.asked)) == ("pending", "truncated", 1, 2)
    _again(stand, row.id)
    row = _again(stand, row.id)
    assert (row.status, row.error_code, row.attempts) == ("failed", "truncated", 3)
    assert stand.files == []


def test_a_transfer_below_the_floor_is_given_up_for_now(
    stand: Stand,
    web: Web,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long before its time is over; what came stays for the next attempt."""
    monkeypatch.setattr(downloads, "FLOOR_SECONDS", 0.3)
    stand.timeout = 30.0
    url = web.serves(
        "/a.png", drips(head(200, ETag=TAG, Content_Length="900000") + BODY[:400], b"x", every=0.05, seconds=9)
    )
    started = time.monotonic()
    row = stand.download(url)
    assert time.monotonic() - started < 7
    assert (row.status, row.error_code) == ("pending", "unreachable")
    assert "slower than" in row.error_message
    assert {path.suffix for path in stand.files} == {".part", ".json"}


def test_a_partial_answer_that_goes_on_beyond_the_end_is_thrown_away(stand: Stand, web: Web, picture: Picture) -> None:
    """Who sends more than there is may have sent anything: all of it is asked for anew."""
    picture.cuts = [100_000]

    def more(client: socket.socket) -> None:
        if web.asked[-1].headers.get("range"):
            span = f"bytes 100000-{len(BODY) - 1}/{len(BODY)}"
            sends(head(206, ETag=TAG, Content_Range=span), BODY[100_000:], b"more" * 1_000)(client)
        else:
            picture(client)

    assert _is_stored(stand, stand.download(web.serves("/a.png", more)))


def test_a_server_that_does_not_heed_if_range_is_found_out_by_the_date_it_names(
    stand: Stand, web: Web, picture: Picture
) -> None:
    """The new file may be as long as the old one."""
    picture.headers = {"Last-Modified": "Tue, 24 Nov 2026 09:59:59 GMT", "Date": "Tue, 24 Nov 2026 10:00:00 GMT"}
    picture.cuts = [100_000]
    other = BODY.replace(b"xx", b"yy")

    def heeds_not(client: socket.socket) -> None:
        asked = web.asked[-1].headers
        if "range" in asked:
            changed = {"Last-Modified": "Tue, 24 Nov 2026 11:00:00 GMT"}
            page(206, other[100_000:], Content_Range=f"bytes 100000-{len(BODY) - 1}/{len(BODY)}", **changed)(client)
        else:
            picture(client)
            picture.body = other

    assert _is_stored(stand, stand.download(web.serves("/a.png", heeds_not)), other)


# ── from one attempt to the next ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def half(stand: Stand, web: Web, picture: Picture) -> int:
    """An output of which 300,000 bytes came before the server went away."""
    picture.cuts = [300_000]

    def goes(client: socket.socket) -> None:
        picture(client)
        web.answers["/a.png"] = page(503, b"")

    row = stand.download(web.serves("/a.png", goes))
    assert (row.status, row.error_code) == ("pending", "http_error")
    web.answers["/a.png"] = picture
    return int(row.id)


def test_the_next_attempt_goes_on_where_the_last_one_was_cut_off(
    half: int,
    stand: Stand,
    picture: Picture,
) -> None:
    """In another process, too: the file says it all."""
    assert _is_stored(stand, _again(stand, half))
    assert picture.spans[-1] == "bytes=300000-"
    assert picture.sent == len(BODY)


def test_the_bytes_of_one_link_never_continue_another(half: int, stand: Stand, web: Web, picture: Picture) -> None:
    """A renewed link may lead to another file, whatever its tag says."""
    web.answers["/b.png"] = picture
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).values(url=web.url + "/b.png"))
    assert _is_stored(stand, _again(stand, half))
    assert picture.spans[-1] == ""


@pytest.mark.parametrize(
    "spoil",
    [
        *("another boot", "no sidecar", "no JSON", "longer than whole", "no validator"),
        *({"length": "7"}, {"length": [7]}, {"length": True}, {"validator": "a\r\nb"}, {"validator": "“"}, {"link": 7}),
    ],
    ids=str,
)
def test_what_is_not_sure_is_thrown_away(
    spoil: str | dict[str, Any], half: int, stand: Stand, picture: Picture
) -> None:
    """After a crash of the host there may be holes in it."""
    part = stand.out / PARTIAL / f"{half}.part"
    note = part.with_suffix(".json")
    said = json.loads(note.read_text())
    match spoil:
        case "another boot":
            note.write_text(json.dumps(said | {"host": "0badb007"}))
        case "no sidecar":
            note.unlink()
        case "no JSON":
            note.write_text("{")
        case "longer than whole":
            part.write_bytes(b"x" * 2_000_000)
        case "no validator":
            note.write_text(json.dumps(said | {"validator": ""}))
        case dict():
            note.write_text(json.dumps(said | spoil))
    assert _is_stored(stand, _again(stand, half))
    assert picture.spans[-1] == ""


def test_no_link_is_written_into_a_sidecar(half: int, stand: Stand) -> None:
    """Links may carry signatures."""
    assert "http" not in (stand.out / PARTIAL / f"{half}.json").read_text()


def test_while_our_own_storage_is_in_trouble_nothing_comes_twice(
    stand: Stand,
    web: Web,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole file waits for the storage, also where the server says nothing of versions or lengths."""
    refuse = Event()
    refuse.set()
    real = downloads.Downloader._keep

    def keep(self: downloads.Downloader, output: Any, incoming: Any) -> Attempt:
        with monkeypatch.context() as patched:
            if refuse.is_set():
                patched.setattr(self._storage, "keep", _refuses)
            return real(self, output, incoming)

    monkeypatch.setattr(downloads.Downloader, "_keep", keep)
    row = stand.download(web.serves("/a.png", sends(head(200), BODY)))
    assert (row.status, row.error_code) == ("pending", "storage")
    refuse.clear()
    row = _again(stand, row.id)
    assert _is_stored(stand, row)
    assert len(web.asked) == 1


def _refuses(*_: Any, **__: Any) -> str:
    raise StorageTrouble("not now")


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(
    stand: Stand,
    web: Web,
    picture: Picture,
    tmp_path: Path,
) -> None:
    """`kill -9` in mid-transfer: one file in the end, with the right bytes."""
    picture.cuts = [400_000]

    def stops(client: socket.socket) -> None:
        picture(client)
        if len(web.asked) == 1:
            time.sleep(8)  # until the process is killed

    output_id = stand.add(web.serves("/a.png", stops))
    program = f"""
import ipaddress, sys
from pathlib import Path
from tests.download_stand import Stand
from sqlalchemy.engine import make_url
from worker.store.engine import make_engine
Stand(make_engine(make_url("sqlite:///{tmp_path}/test.db")), Path({str(stand.out)!r})).downloader().run({output_id})
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    part = stand.out / PARTIAL / f"{output_id}.part"
    until = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size >= 390_000) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert part.stat().st_size >= 390_000
    row = read_output(stand.engine, output_id)
    with stand.engine.begin() as connection:
        assert release_crashed(connection, dead_holders(claim_holders(connection)), now=row.listed_at).rows
    assert _is_stored(stand, _again(stand, output_id))
    assert picture.sent < 1.2 * len(BODY)


def test_what_a_base64_text_was_decoded_to_is_never_followed_by_the_rest_of_the_text(
    stand: Stand, web: Web, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a process is killed between the two, the sidecar of the text must not stand beside a picture."""
    picture.body = base64.b64encode(png(padding=60_000))

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> str:
        raise Killed

    output_id = stand.add(web.url + "/a.png")
    with monkeypatch.context() as patched:
        patched.setattr(FileStorage, "keep", killed)
        patched.setattr(Incoming, "close", lambda incoming: os.close(incoming._handle))
        with pytest.raises(Killed):
            stand.downloader().run(output_id)
    with stand.engine.begin() as connection:
        connection.execute(update(outputs).values(claim_token=None, claim_holder=None))
    assert _is_stored(stand, _again(stand, output_id), png(padding=60_000))
    assert len(web.asked) == 1


# ── files of two processes ────────────────────────────────────────────────────────────────────────────────────────────


def test_two_that_receive_the_same_output_at_once_do_not_mix(tmp_path: Path) -> None:
    """The second one, whose claim is the newer, has a file of its own; the first one's lasts."""
    partials = PartialFiles(tmp_path / "p")
    source = Source(link_hash("x"), TAG, 30)
    with partials.receive(7, "a") as first:
        first.begin(source)
        first.write(b"a" * 10)
        with partials.receive(7, "b") as second:
            second.begin(source)
            second.write(b"b" * 20)
            second.hold = True
            assert (first.size, second.size, first.path.read_bytes()) == (10, 20, b"a" * 10)
        first.hold = True
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"7.part", "7.json"}
    with partials.receive(7, "c") as third:
        assert (third.size, third.source) == (10, source)


def test_a_name_that_went_to_another_file_while_we_waited_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the file may have got its final name: not a byte may follow there."""
    partials = PartialFiles(tmp_path / "p")
    partials.folder.mkdir()
    (partials.folder / "7.part").write_bytes(b"whole")
    real = os.open

    def opens(path: Any, *rest: Any, **named: Any) -> int:
        handle = real(path, *rest, **named)
        kept = tmp_path / "kept.png"
        if str(path).endswith("7.part") and not kept.exists():
            Path(path).rename(kept)
        return handle

    monkeypatch.setattr(os, "open", opens)
    with partials.receive(7, "t") as incoming:
        incoming.write(b"other")
    assert (tmp_path / "kept.png").read_bytes() == b"whole"


def test_who_has_named_a_file_lets_alone_what_the_next_one_receives_under_the_old_name(tmp_path: Path) -> None:
    """Else a third one could take the name, and the second one would give its unfinished file a final name."""
    storage, media = FileStorage(tmp_path / "out"), Media("image/png", "png")
    storage.prepare()
    source = Source(link_hash("x"), TAG, 100)
    with storage.partials.receive(7, "a") as first:
        first.begin(source)
        first.write(b"a" * 100)
        storage.keep(first, job_id=1, position=0, media=media)
        later = storage.partials.receive(7, "b")
        second = later.__enter__()
        second.begin(source)
        second.write(b"b" * 100)
    with storage.partials.receive(7, "c") as third:
        third.begin(source)
        third.write(b"c" * 40)
        assert path_of(storage.keep(second, job_id=1, position=0, media=media)).read_bytes() == b"b" * 100
        later.__exit__(None, None, None)
        assert third.path.read_bytes() == b"c" * 40


def test_a_file_whose_temporary_name_is_another_s_gets_no_final_one(tmp_path: Path) -> None:
    """Whoever removed it."""
    storage = FileStorage(tmp_path / "out")
    storage.prepare()
    with storage.partials.receive(7, "a") as incoming:
        incoming.write(b"a" * 100)
        incoming.path.unlink()
        incoming.path.write_bytes(b"other")
        with pytest.raises(StorageTrouble, match="removed"):
            storage.keep(incoming, job_id=1, position=0, media=Media("image/png", "png"))
    assert incoming.path.read_bytes() == b"other"


@pytest.mark.parametrize("refusal", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_locked_every_claim_has_a_file_of_its_own(
    refusal: int, stand: Stand, web: Web, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems: what breaks starts over in the next attempt, and old files are swept."""

    def refuses(*_: Any) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "flock", refuses)
    picture.cuts = [1_000]
    assert _is_stored(stand, stand.download(web.url + "/a.png"))
    old = stand.out / PARTIAL / "8-t.part"
    old.write_bytes(b"x")
    os.utime(old, (0, 0))
    assert PartialFiles(old.parent).remove_stale(older_than=10) == 1


def test_trouble_while_a_file_is_taken_up_leaves_no_handle_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open one would keep its lock for the life of the process."""

    def refuses(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    partials = PartialFiles(tmp_path / "p")
    for call in ("utime", "ftruncate"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, refuses)
            with pytest.raises(StorageTrouble), partials.receive(7, "a"):
                pass
        with partials.receive(7, "b") as incoming:
            assert incoming.path.name == "7.part"


def test_old_partial_files_are_swept_but_none_that_is_written_to(tmp_path: Path) -> None:
    """With their sidecars, and what a crash left beside no file."""
    partials = PartialFiles(tmp_path)
    past = time.time() - 1_000
    for name in ("1.part", "1.json", "2.json", "3.other"):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (past, past))
    with partials.receive(9, "t") as busy:
        busy.begin(Source(link_hash("x"), TAG))
        os.utime(busy.path, (past, past))
        os.utime(busy.path.with_suffix(".json"), (past, past))
        partials.remove_stale(older_than=500)
        assert {path.name for path in tmp_path.iterdir()} == {"9.part", "9.json"}


# ── hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_host_that_hangs_takes_no_more_than_its_places() -> None:
    """Others go on; a place that is free again is given to whoever waits."""
    hosts = HostSlots(1, wait_seconds=0.05)
    with hosts.slot("a") as first, hosts.slot("a") as second, hosts.slot("b") as other:
        assert (first, second, other) == (True, False, True)
    with hosts.slot("a") as again:
        assert again

    patient, got = HostSlots(1, wait_seconds=5), list[bool]()

    def waits() -> None:
        with patient.slot("a") as free:
            got.append(free)

    with patient.slot("a"):
        thread = Thread(target=waits)
        thread.start()
        time.sleep(0.05)
    thread.join(5)
    assert got == [True]


def test_what_waits_for_a_host_that_hangs_does_not_keep_the_others_waiting(stand: Stand, web: Web) -> None:
    """However many there are, and however old: threads that are free take what they can store."""
    hang = Event()
    stand.timeout = 30.0

    def hangs(_: socket.socket) -> None:
        hang.wait(20)

    with web_server("127.0.0.2") as other:
        url = other.serves("/h.png", hangs)
        waiting = [stand.add(f"{url}?{number}") for number in range(150)]
        late = [stand.add(web.serves(f"/{number}.png", page(200, png(padding=number)))) for number in range(5)]
        downloader = stand.downloader()
        downloader._hosts = HostSlots(2)
        over = Event()

        def works() -> None:
            while not over.is_set():
                downloader.run(waiting[0])

        threads = [Thread(target=works) for _ in range(4)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while (states := {read_output(stand.engine, one).status for one in late}) != {"stored"}:
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        over.set()
        hang.set()
        for thread in threads:
            thread.join()
    assert states == {"stored"}


@contextmanager
def _none_free(_: HostSlots, __: str) -> Iterator[bool]:
    yield False


def test_an_output_whose_host_is_busy_is_given_back_and_it_costs_no_attempt(
    stand: Stand, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Due again in a few seconds."""
    monkeypatch.setattr(HostSlots, "slot", _none_free)
    output_id = stand.add(web.url + "/a.png")
    assert "busy" in stand.downloader().run(output_id)
    row = read_output(stand.engine, output_id)
    assert (row.status, row.attempts, row.claim_token, row.error_code) == ("pending", 0, None, None)
    assert row.due_at > row.listed_at
    assert web.asked == []
