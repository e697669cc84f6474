"""Promises of the way to an object store: every fault that passes is survived, within limits, and counted."""

from __future__ import annotations

import asyncio
import io
import itertools
import multiprocessing
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpcscale import storage
from cpcscale.errors import UserError
from cpcscale.storage import StorageConfig, TrafficCounts, s3_requests

DATA = random.Random(1).randbytes(300_000)
LARGE = DATA * 56  # 16.8 MB: three parts
TIMES = 2


def limits(**changed: float) -> None:
    """The fixture's short pauses, with other limits."""
    storage.configure(StorageConfig(**{"backoff_base_s": 0.01, "backoff_cap_s": 0.1, **changed}))


@pytest.fixture
def url(faulty_s3) -> str:
    """An object that holds DATA, behind the proxy."""
    storage.write(storage.join(faulty_s3.base, "x"), DATA)
    return storage.join(faulty_s3.base, "x")


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def spent(before: TrafficCounts) -> tuple[int, int, int, int]:
    """(requests, retries, bytes_read, bytes_written) since `before`."""
    lap = storage.counters() - before
    assert lap.seconds >= 0
    return lap.requests, lap.retries, lap.bytes_read, lap.bytes_written


READERS = {
    "whole": (storage.read, DATA),
    "range": (lambda url: storage.read(url, 1000, 200_000), DATA[1000:200_000]),
    "chunks": (lambda url: b"".join(storage.chunks(url, 10, 100_000)), DATA[10:]),
    "file": (lambda url: storage.opened(url).read(), DATA),
}


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer", "reset_in_body", "cut", "short", "delay"])
def test_a_read_survives_every_fault_with_the_right_bytes_and_counts_what_was_sent(faulty_s3, url, kind):
    for name, (read, expected) in READERS.items():
        if (kind, name) == ("short", "whole"):
            continue  # A whole object that says it is shorter cannot be told from one that is.
        before, sent = storage.counters(), faulty_s3.requests.total()
        fault = faulty_s3.fail(kind, times=TIMES, method="GET", seconds=0.01)
        assert read(url) == expected, name
        failed = 0 if kind == "delay" else TIMES
        assert fault.struck >= max(failed, 1)
        assert spent(before) == (faulty_s3.requests.total() - sent, failed, len(expected), 0)
        faulty_s3.heal()


@pytest.mark.parametrize("kind", ["unavailable", "reset", "lost_answer"])
def test_a_write_survives_every_fault_and_counts_what_was_sent(faulty_s3, kind):
    url = storage.join(faulty_s3.base, "x")
    # A kept connection, on which aiohttp would send a PUT again by itself.
    storage.write(url, b"old")
    for publish, data, method in itertools.product((storage.write, _publish), (DATA, LARGE), ("PUT", "POST")):
        before, sent = storage.counters(), faulty_s3.requests.total()
        fault = faulty_s3.fail(kind, times=TIMES, method=method)
        publish(url, data)
        assert fault.struck == (0 if method == "POST" and data is DATA else TIMES)
        assert spent(before) == (faulty_s3.requests.total() - sent, fault.struck, 0, len(data))
        faulty_s3.heal()
        assert storage.read(url) == data


def _publish(url: str, data: bytes) -> None:
    with storage.publishing(url) as aside:
        aside.write_bytes(data)


def test_without_faults_the_counters_are_those_of_the_proxy(faulty_s3):
    before, urls = storage.counters(), [storage.join(faulty_s3.base, name) for name in "abc"]
    for url, data in zip(urls, (DATA, LARGE, b""), strict=True):
        storage.write(url, data)
        assert storage.read(url) == data
    assert faulty_s3.requests["GET"] == 3
    assert faulty_s3.requests["HEAD"] == 0
    assert b"".join(storage.chunks(urls[1])) == LARGE
    read, written = faulty_s3.sent_bytes["GET"], faulty_s3.received_bytes["PUT"]
    assert spent(before) == (faulty_s3.requests.total(), 0, read, written)


def test_many_readers_through_many_faults_get_their_bytes_and_the_counters_add_up(faulty_s3, url):
    spans = [(at, at + 10_000) for at in range(0, len(DATA), 10_000)] * 3
    before, sent = storage.counters(), faulty_s3.requests.total()
    faults = [faulty_s3.fail(kind, share=0.15) for kind in ("unavailable", "reset", "cut", "lost_answer", "short")]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda span: storage.read(url, *span), spans)) == [DATA[slice(*span)] for span in spans]
    struck = [fault.struck for fault in faults]
    assert min(struck) > 0
    assert faulty_s3.requests.total() - sent == len(spans) + sum(struck)
    assert spent(before) == (len(spans) + sum(struck), sum(struck), len(DATA) * 3, 0)


@pytest.mark.parametrize("kind", ["unavailable", "reset", "cut", "lost_answer"])
def test_listing_asking_and_removing_survive_every_fault(faulty_s3, kind):
    for method in ("GET", "HEAD", "DELETE"):
        for name in ("a", "b/c"):
            storage.write(storage.join(faulty_s3.base, name), DATA)
        faulty_s3.fail(kind, times=TIMES, method=method)
        assert storage.list_files(faulty_s3.base) == ["a", "b/c"]
        faulty_s3.fail(kind, times=TIMES, method=method)
        assert not storage.exists(storage.join(faulty_s3.base, "z"))
        assert storage.exists(storage.join(faulty_s3.base, "b"))
        faulty_s3.fail(kind, times=TIMES, method=method)
        assert storage.size(storage.join(faulty_s3.base, "a")) == len(DATA)
        storage.remove(storage.join(faulty_s3.base, "a"))
        faulty_s3.heal()
        assert storage.list_files(faulty_s3.base) == ["b/c"]


def test_a_page_of_a_long_listing_that_fails_does_not_begin_the_listing_anew(faulty_s3, monkeypatch):
    names = list("abcde")
    for name in names:
        storage.write(storage.join(faulty_s3.base, name), b"")
    # The server's page has 1,000 names.
    monkeypatch.setattr(storage._open(faulty_s3.base)[0], "s3_additional_kwargs", {"MaxKeys": 2})
    lists = faulty_s3.requests["GET"]
    faulty_s3.fail("unavailable", times=TIMES, method="GET", path="continuation-token")
    assert storage.list_files(faulty_s3.base) == names
    assert faulty_s3.requests["GET"] - lists == 3 + TIMES


def test_a_chunk_that_fails_costs_that_chunk_only(faulty_s3, url):
    sent = faulty_s3.requests["GET"]
    arriving = storage.chunks(url, chunk_bytes=40_000)
    first = next(arriving)
    faulty_s3.fail("cut", times=TIMES, method="GET")
    assert first + b"".join(arriving) == DATA
    assert faulty_s3.requests["GET"] - sent == 8 + TIMES


def test_a_part_that_fails_costs_that_part_only(faulty_s3):
    before = storage.counters()
    faulty_s3.fail("lost_answer", times=1, method="PUT", path="partNumber=2")
    storage.write(storage.join(faulty_s3.base, "x"), LARGE)
    assert (storage.counters() - before).retries == 1
    assert faulty_s3.received_bytes["PUT"] == len(LARGE) + 8 * 2**20


def test_an_upload_whose_last_answer_was_lost_is_sent_again(faulty_s3):
    url = storage.join(faulty_s3.base, "x")
    storage.write(url, b"old")
    for kind in ({"kind": "lost_answer"}, {"kind": "status", "status": 404, "code": "NoSuchUpload"}):
        fault = faulty_s3.fail(**kind, times=1, method="POST", path="uploadId")
        data = LARGE + kind["kind"].encode()
        storage.write(url, data)
        assert fault.struck == 1
        assert storage.read(url) == data


def test_a_refusal_that_passes_is_tried_again_and_one_that_does_not_is_told_at_once(faulty_s3, url):
    passing = [(500, "InternalError"), (502, "x"), (503, "SlowDown"), (504, "x"), (429, "x"), (400, "RequestTimeout")]
    passing += [(400, "ThrottlingException"), (400, "BadDigest"), (409, "OperationAborted")]
    lasting = [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"), (404, "NoSuchKey")]
    lasting += [(404, "NoSuchBucket"), (400, "InvalidArgument"), (501, "NotImplemented"), (501, "x"), (507, "x")]
    for status, code in passing + lasting:
        sent = faulty_s3.requests["GET"]
        faulty_s3.fail("status", times=1, method="GET", status=status, code=code)
        if (status, code) in passing:
            assert storage.read(url) == DATA
        else:
            assert url in refusal(lambda: storage.read(url))
        assert faulty_s3.requests["GET"] - sent == (2 if (status, code) in passing else 1), (status, code)


def test_what_the_real_store_refuses_is_not_tried_again(faulty_s3, monkeypatch):
    before = storage.counters()
    with pytest.raises(storage.NotFoundError):
        storage.read(storage.join(faulty_s3.base, "absent"))
    assert "NoSuchBucket" in refusal(lambda: storage.read("s3://no-such-bucket/x"))
    refusal(lambda: storage.read("s3://No_Such:Name/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    limits()
    assert "denied" in refusal(lambda: storage.read(storage.join(faulty_s3.base, "absent")))
    assert spent(before) == (3, 0, 0, 0)


def test_a_server_that_takes_the_request_and_never_answers_does_not_hold_us(faulty_s3, url):
    limits(request_timeout_s=0.5)
    for method, action in (
        ("GET", lambda: storage.read(url) == DATA),
        ("PUT", lambda: storage.create(url + "2", b"x")),
    ):
        fault = faulty_s3.fail("hang", times=TIMES, method=method)
        assert action()
        assert fault.struck == TIMES
    limits(request_timeout_s=0.5, total_timeout_s=2)
    fault = faulty_s3.fail("hang")
    assert "no whole answer within" in refusal(lambda: storage.read(url))
    assert fault.struck >= 3


@pytest.mark.parametrize("kind", ["hang", "unavailable", "down"])
def test_a_dead_store_is_one_line_that_says_what_was_tried_and_the_way_out(faulty_s3, url, kind):
    limits(request_timeout_s=0.3, total_timeout_s=0.6, connect_timeout_s=0.3)
    faulty_s3.down(600) if kind == "down" else faulty_s3.fail(kind)
    actions = [lambda: storage.read(url), lambda: storage.write(url, DATA), lambda: list(storage.chunks(url))]
    # s3fs itself takes a bucket that does not answer for one that is not there.
    actions += [lambda: storage.exists("s3://speech"), lambda: storage.list_files(faulty_s3.base)]
    for action in actions:
        told = refusal(action)
        for word in ("s3://speech", " tries over ", "AWS_ENDPOINT_URL", "storage.total_timeout_s"):
            assert word in told


def test_a_store_that_is_away_for_a_while_is_waited_for(faulty_s3, url):
    arriving = storage.chunks(url, chunk_bytes=40_000)
    first = next(arriving)
    for action in (
        lambda: first + b"".join(arriving) == DATA,
        lambda: storage.write(url, DATA) is None,
        lambda: storage.read(url) == DATA,
    ):
        before = storage.counters()
        faulty_s3.down(0.7)
        assert action()
        assert (storage.counters() - before).retries > 0


def test_trouble_that_lasts_is_told_once_a_request(faulty_s3, url, monkeypatch, caplog):
    monkeypatch.setattr(s3_requests, "_WARN_AFTER_S", 0.0)
    faulty_s3.fail("unavailable", times=3)
    assert storage.read(url) == DATA
    (record,) = caplog.records
    assert url in record.getMessage()
    assert "up to 120 s" in record.getMessage()


class Clock:
    """A time that only pauses move, in place of the module's clock and sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []
        monkeypatch.setattr(s3_requests, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(s3_requests, "asyncio", SimpleNamespace(sleep=self.sleep))

    async def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds


@pytest.mark.parametrize("attempt_s", [0.0, 5.0], ids=["refused", "unanswered"])
def test_the_defaults_survive_an_outage_of_20_s_and_end_after_the_total(monkeypatch, attempt_s):
    for _ in range(200):
        clock = Clock(monkeypatch)

        async def attempt(number: int, limit_s: float, ends_s: float, clock: Clock = clock) -> str:
            if clock.now_s >= ends_s:
                return "through"
            clock.now_s += min(attempt_s, limit_s)
            raise ConnectionRefusedError

        def run(ends_s: float, attempt=attempt) -> str:
            return asyncio.run(
                s3_requests.retry(lambda n, limit_s: attempt(n, limit_s, ends_s), (), StorageConfig(), "x")
            )

        assert run(20.0) == "through"
        clock.now_s = 0.0
        with pytest.raises(s3_requests.GaveUpError):
            run(1e9)
        settings = StorageConfig()
        assert settings.total_timeout_s - settings.backoff_cap_s <= clock.now_s <= settings.total_timeout_s + attempt_s


def test_pauses_are_drawn_from_all_of_a_span_that_doubles_up_to_its_cap(monkeypatch):
    settings = StorageConfig(backoff_base_s=0.5, backoff_cap_s=4, total_timeout_s=1000)
    runs = []
    for _ in range(200):
        clock, fails = Clock(monkeypatch), iter(range(6))

        async def attempt(number: int, limit_s: float, fails=fails) -> None:
            if next(fails, None) is not None:
                raise TimeoutError

        asyncio.run(s3_requests.retry(attempt, (), settings, "x"))
        runs.append(clock.pauses_s)
    for pauses, top in zip(zip(*runs, strict=True), (1, 2, 4, 4, 4, 4), strict=True):
        assert 0 <= min(pauses) < 0.2 * top
        assert 0.8 * top < max(pauses) <= top


def test_a_lost_answer_does_not_make_a_winner_lose_nor_a_loser_win(faulty_s3):
    url = storage.join(faulty_s3.base, "lease")
    for number, kind in enumerate(("lost_answer", "reset", "unavailable")):
        faulty_s3.fail(kind, times=1, method="PUT")
        assert storage.create(f"{url}{number}", b"mine")
        faulty_s3.fail(kind, times=1, method="PUT")
        assert not storage.create(f"{url}{number}", b"yours")
        assert not storage.create(f"{url}{number}", b"mine")
        assert storage.read(f"{url}{number}") == b"mine"


def test_a_byte_changed_on_the_way_is_handed_on_for_the_readers_checksum_to_find(faulty_s3, url):
    faulty_s3.fail("flip", times=1, method="GET")
    changed = storage.read(url, 0, len(DATA))
    assert sum(a != b for a, b in zip(changed, DATA, strict=True)) == 1
    assert storage.read(url, 0, len(DATA)) == DATA


def test_parts_of_two_versions_never_meet(url):
    file, arriving = storage.opened(url), storage.chunks(url, chunk_bytes=40_000)
    assert file.read(10) == DATA[:10]
    next(arriving)
    storage.write(url, DATA[::-1])
    for action in (lambda: file.read(10), lambda: list(arriving)):
        assert "was replaced while it was read" in refusal(action)


def test_a_column_of_a_parquet_file_costs_less_than_the_file(faulty_s3):
    url = storage.join(faulty_s3.base, "x.parquet")
    table = pa.table({name: pa.array(random.Random(name).choices(range(2**40), k=50_000)) for name in "abcd"})
    out = io.BytesIO()
    pq.write_table(table, out)
    storage.write(url, out.getvalue())
    sent = faulty_s3.sent_bytes["GET"]
    faulty_s3.fail("cut", times=1, method="GET")
    with storage.opened(url) as file:
        assert pq.ParquetFile(file).read(columns=["c"]).equals(table.select(["c"]))
    assert 0 < faulty_s3.sent_bytes["GET"] - sent < len(out.getvalue()) / 2


def test_the_file_of_an_object_reads_and_seeks_like_any_other(faulty_s3):
    url = storage.join(faulty_s3.base, "x")
    storage.write(url, DATA[:1000])
    steps = st.tuples(st.sampled_from(["read", "readinto", "set", "cur", "end"]), st.integers(-50, 1200))

    @given(st.lists(steps, max_size=6))
    def check(path: list[tuple[str, int]]) -> None:
        with storage.opened(url) as ours, io.BytesIO(DATA[:1000]) as real:
            assert (ours.readable(), ours.seekable(), ours.writable()) == (True, True, False)
            for step, number in path:
                for_both = []
                for file in (ours, real):
                    into = bytearray(abs(number))
                    match step:
                        case "read":
                            got: object = file.read(number)
                        case "readinto":
                            got = (file.readinto(into), bytes(into))
                        case "set":
                            got = file.seek(abs(number))
                        case _:
                            whence = 1 if step == "cur" else 2
                            got = file.seek(max(number, -file.tell() if whence == 1 else -1000), whence)
                    for_both.append((got, file.tell()))
                assert for_both[0] == for_both[1]

    check()
    closed = storage.opened(url)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.read(1)


def test_counts_from_many_threads_add_up_and_laps_are_differences():
    tally = s3_requests.TrafficTotals()
    start = tally.now()
    threads = [
        threading.Thread(target=lambda: [tally.add(requests=1, bytes_read=3) for _ in range(2000)]) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    half = tally.now()
    tally.add(retries=2, seconds=0.5)
    assert half - start == TrafficCounts(requests=8000, bytes_read=24_000)
    assert tally.now() - half == TrafficCounts(retries=2, seconds=0.5)


def test_local_files_are_not_counted(tmp_path):
    before = storage.counters()
    url = str(tmp_path / "x")
    storage.write(url, DATA)
    assert (storage.read(url), b"".join(storage.chunks(url)), storage.size(url)) == (DATA, DATA, len(DATA))
    storage.remove(url)
    assert storage.counters() - before == TrafficCounts()


def test_a_forked_process_counts_from_zero():
    s3_requests.TRAFFIC.add(requests=1)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(storage.counters()))
    child.start()
    assert queue.get(timeout=60) == TrafficCounts()
    child.join()


def test_a_limit_that_makes_no_sense_is_refused_by_its_name():
    names = [f"{name}_timeout_s" for name in ("connect", "request", "total")] + ["backoff_base_s", "backoff_cap_s"]
    for name, value in itertools.product(names, (0, -1, float("nan"), float("inf"))):
        assert f"storage.{name}={value}" in refusal(lambda name=name, value=value: StorageConfig(**{name: value}))


def test_chunks_of_any_length_from_any_start_are_the_rest_of_the_file(faulty_s3, tmp_path):
    data = DATA[:1000]
    for url in (str(tmp_path / "x"), storage.join(faulty_s3.base, "x")):
        storage.write(url, data)
        for start, length in itertools.product((0, 1, 500, 999, 1000), (1000, 999, 250, 2000)):
            parts = list(storage.chunks(url, start, length))
            assert b"".join(parts) == data[start:]
            assert {len(part) for part in parts[:-1]} <= {length}
        assert "1000 bytes, not the 1001 read before" in refusal(lambda url=url: next(storage.chunks(url, 1001)))
        with pytest.raises(storage.NotFoundError):
            next(storage.chunks(url + "-absent"))
