"""Shards far away give what the same shards give here, through a cache that keeps its bound."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from groundwork.data import remote_stores
from groundwork.data.decode import Picture
from groundwork.data.loader import Arrays, Loader
from groundwork.data.order import Order
from groundwork.data.remote import open_remote
from groundwork.data.remote_samples import RemoteSamples
from groundwork.data.remote_stores import FsspecStore, open_store
from groundwork.data.samples import open_samples
from groundwork.data.shard_sets import open_shards
from groundwork.data.shards import expand_braces
from groundwork.data.write_shards import write_shards
from groundwork.errors import DataError, UnavailableError, UsageError
from tests.groundwork.data.web import Web, serving

SHARDS = 6
EACH = 4
PLENTY = 10**9


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_stores, "PAUSES", (0.01, 0.01, 0.01))


@pytest.fixture
def packed(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    samples = (
        (f"class {number % 2}/bild.{number}#?", {"jpg": make_jpeg(number)})
        for number in range(SHARDS * EACH)
    )
    return write_shards(tmp_path / "web" / "set", samples, shard_size=EACH)


@pytest.fixture
def web(packed: Path) -> Iterator[Web]:
    with serving(packed.parent) as web:
        yield web


def tars(web: Web) -> dict[str, int]:
    return {Path(path).name: n for path, n in web.asked.items() if path.endswith(".tar")}


def opened(web: Web, tmp_path: Path, cache_bytes: int = PLENTY, url: str = "") -> RemoteSamples:
    return open_remote([url or f"{web.url}/set"], cache=tmp_path / "c", cache_bytes=cache_bytes)


def everything(samples: RemoteSamples) -> list[tuple[str, bytes, str | None]]:
    found = []
    for shard, size in enumerate(samples.shard_sizes.tolist()):
        for index in range(size):
            sample = samples.read(shard, index)
            found.append((sample.key, sample.image, sample.label))
    return found


def local(packed: Path, tmp_path: Path) -> list[tuple[str, bytes, str | None]]:
    with closing(open_shards(str(packed), tmp_path / "index")) as samples:
        reads = [samples.read(shard, index) for shard in range(SHARDS) for index in range(EACH)]
        return [(sample.key, sample.image, sample.label) for sample in reads]


def cached_bytes(tmp_path: Path) -> int:
    """Sum up what the cache takes now; a file that is being renamed counts once."""
    found: dict[int, int] = {}
    for folder in ("incoming", "entries"):
        for place, _, files in os.walk(tmp_path / "c" / "remote" / folder):
            for name in files:
                with suppress(FileNotFoundError):
                    status = Path(place, name).stat()
                    found[status.st_ino] = status.st_size
    return sum(found.values())


def shard_bytes(packed: Path) -> int:
    return max(
        tar.stat().st_size + tar.with_suffix(".samples.json").stat().st_size
        for tar in packed.glob("*.tar")
    )


@pytest.mark.parametrize(
    "tail", ["set", "set/", "set/index.json", "set/shard-{000000..000005}.tar"]
)
def test_what_is_far_away_reads_as_what_is_here(
    web: Web, packed: Path, tmp_path: Path, tail: str
) -> None:
    samples = opened(web, tmp_path, url=f"{web.url}/{tail}")
    assert everything(samples) == local(packed, tmp_path)
    assert len(samples) == SHARDS * EACH
    assert samples.fingerprint == open_shards(str(packed), tmp_path / "index").fingerprint
    assert samples.read(1, 0).source == f"{web.url}/set/shard-000001.tar"
    assert set(tars(web).values()) == {1}


def test_some_shards_of_a_set_can_be_named(web: Web, packed: Path, tmp_path: Path) -> None:
    samples = opened(web, tmp_path, url=f"{web.url}/set/shard-00000{{4,1}}.tar")
    whole = local(packed, tmp_path)
    assert everything(samples) == whole[4 * EACH : 5 * EACH] + whole[EACH : 2 * EACH]
    assert sorted(tars(web)) == ["shard-000001.tar", "shard-000004.tar"]


def test_the_cache_survives_the_run(web: Web, tmp_path: Path) -> None:
    first = everything(opened(web, tmp_path))
    assert everything(opened(web, tmp_path)) == first
    assert set(tars(web).values()) == {1}


def test_a_set_that_was_replaced_is_not_read_from_the_old_cache(
    web: Web, packed: Path, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    old = everything(opened(web, tmp_path))
    shutil.rmtree(packed)
    write_shards(packed, (("only", {"jpg": make_jpeg(99)}) for _ in range(1)))
    new = everything(opened(web, tmp_path))
    assert new == [("only", make_jpeg(99), None)] and new[0] not in old


def test_the_bound_of_the_cache_is_held(web: Web, packed: Path, tmp_path: Path) -> None:
    limit = 3 * shard_bytes(packed)
    samples = opened(web, tmp_path, cache_bytes=limit)
    seen = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(cached_bytes(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(3):
            samples.prefetch([0, 1])
            assert everything(samples) == local(packed, tmp_path)
    finally:
        stop.set()
        watcher.join()
        samples.close()
    assert 0 < max(seen) <= limit


def test_the_least_recently_read_shard_goes_first(web: Web, packed: Path, tmp_path: Path) -> None:
    samples = opened(web, tmp_path, cache_bytes=3 * shard_bytes(packed))
    for shard in (0, 1, 2):
        samples.read(shard, 0)
        time.sleep(0.02)
    time.sleep(1.05)  # times of use are noted to the second
    samples.read(0, 1)
    samples.read(3, 0)  # in the place of 1
    samples.read(0, 2)
    samples.read(2, 0)
    assert tars(web) == {f"shard-{number:06d}.tar": 1 for number in range(4)}
    samples.read(1, 0)
    assert tars(web)["shard-000001.tar"] == 2


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def test_what_was_announced_is_fetched_and_goes_last(
    web: Web, packed: Path, tmp_path: Path
) -> None:
    samples = opened(web, tmp_path, cache_bytes=4 * shard_bytes(packed))
    with closing(samples):
        samples.prefetch([2, 5])
        wait_for(lambda: len(list((tmp_path / "c/remote/entries").iterdir())) == 2)
        for shard in (0, 1, 3, 4, 0, 1, 3, 4):  # two places for four shards
            samples.read(shard, 0)
        samples.read(2, 0)
        samples.read(5, 0)
        assert tars(web)["shard-000002.tar"] == tars(web)["shard-000005.tar"] == 1
        samples.prefetch([0])  # what is no longer wanted goes like any other
        time.sleep(0.02)
        for shard in (0, 1, 3, 4):
            samples.read(shard, 0)
            time.sleep(0.02)
        before = tars(web)["shard-000002.tar"]
        samples.read(2, 0)
        assert tars(web)["shard-000002.tar"] == before + 1


def test_a_cache_too_small_for_what_comes_next_is_said_once(
    web: Web, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = opened(web, tmp_path, cache_bytes=2 * shard_bytes(packed))
    with closing(samples), caplog.at_level(logging.WARNING):
        samples.prefetch([0, 1, 2, 3])
        samples.prefetch([1, 2, 3, 4])
        assert everything(samples) == local(packed, tmp_path)
    assert [record for record in caplog.records if "data.cache_gb" in record.message] == [
        caplog.records[0]
    ]


def test_a_shard_larger_than_the_whole_cache_is_refused(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than data\.cache_gb=1e-06"):
        opened(web, tmp_path, cache_bytes=1000).read(0, 0)


def test_close_stops_the_threads_that_fetch(web: Web, tmp_path: Path) -> None:
    samples = opened(web, tmp_path)
    samples.prefetch([0, 1, 2])
    assert any(thread.name.startswith("fetch-") for thread in threading.enumerate())
    samples.close()
    assert not any(thread.name.startswith("fetch-") for thread in threading.enumerate())
    samples.prefetch([3])  # and it can go on
    wait_for(lambda: "shard-000003.tar" in tars(web))
    samples.close()


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "reset"])
def test_a_transport_error_is_tried_again(web: Web, tmp_path: Path, fault: int | str) -> None:
    web.faults["set/shard-000000.tar"] = [fault, fault, fault]
    web.faults["set/shard-000000.samples.json"] = [fault]
    web.faults["set/index.json"] = [fault]
    assert opened(web, tmp_path).read(0, 0).image
    assert tars(web)["shard-000000.tar"] == 4
    assert list((tmp_path / "c/remote/incoming").iterdir()) == []


@pytest.mark.parametrize("fault", [500, "cut", "reset"])
def test_a_transport_error_that_stays_names_the_url_and_the_attempts(
    web: Web, tmp_path: Path, fault: int | str
) -> None:
    web.faults["set/shard-000000.tar"] = [fault] * 100
    samples = opened(web, tmp_path)
    with pytest.raises(UnavailableError, match=rf"{web.url}/set/shard-000000.tar.*4 times.*resume"):
        samples.read(0, 0)
    assert tars(web)["shard-000000.tar"] == 4
    web.faults["set/shard-000000.tar"] = []  # it may be there a moment later
    assert samples.read(0, 1).image


@pytest.mark.parametrize("fault", [403, 404])
def test_a_refusal_is_not_tried_again(web: Web, tmp_path: Path, fault: int) -> None:
    web.faults["set/shard-000000.tar"] = [fault] * 100
    with pytest.raises(DataError, match=rf"shard-000000.tar.*{fault}.*credentials"):
        opened(web, tmp_path).read(0, 0)
    assert tars(web)["shard-000000.tar"] == 1


def test_nobody_there_is_said(tmp_path: Path) -> None:
    with serving(tmp_path) as web:
        pass
    with pytest.raises(DataError, match=r"no answer.*4 times"):
        opened(web, tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "longer", "samples"])
def test_a_damaged_shard_never_enters_the_cache(
    web: Web, packed: Path, tmp_path: Path, damage: str
) -> None:
    tar = packed / "shard-000000.tar"
    if damage == "samples":
        tar = packed / "shard-000000.samples.json"
    content = bytearray(tar.read_bytes())
    content[700 % len(content)] ^= 1
    tar.write_bytes(content + (b"\0" if damage == "longer" else b""))
    with pytest.raises(DataError, match=r"set/shard-000000.*[Cc]opy it again"):
        opened(web, tmp_path).read(0, 0)
    assert cached_bytes(tmp_path) == 0
    assert web.asked["set/shard-000000.tar"] <= 1


def test_a_folder_without_index_says_what_was_looked_for(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index.json at http://.*/nothing/"):
        opened(web, tmp_path, url=f"{web.url}/nothing")


def foreign(folder: Path, make_jpeg: Callable[..., bytes]) -> None:
    """Shards as someone else's webdataset writes them, with no index."""
    folder.mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(folder / f"other-{shard:02d}.tar", "w") as tar:
            for number in range(shard + 1):
                for suffix, content in (("jpg", make_jpeg(number)), ("cls", b"ship")):
                    path = folder / "member"
                    path.write_bytes(content)
                    tar.add(path, arcname=f"{shard}-{number}.{suffix}")
                    path.unlink()


def test_shards_of_others_are_fetched_once_and_known_from_then_on(
    web: Web, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    foreign(web.folder / "other", make_jpeg)
    url = f"{web.url}/other/other-{{00..02}}.tar"
    for _ in range(2):
        samples = opened(web, tmp_path, url=url)
        assert samples.shard_sizes.tolist() == [1, 2, 3]
        assert everything(samples)[4] == ("2-1", make_jpeg(1), "ship")
    assert set(tars(web).values()) == {1}


def test_indexing_shards_of_others_goes_on_where_it_was_interrupted(
    web: Web, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    foreign(web.folder / "other", make_jpeg)
    url = f"{web.url}/other/other-{{00..02}}.tar"
    web.faults["other/other-02.tar"] = [404]
    with pytest.raises(DataError, match=r"other-02\.tar cannot be fetched"):
        opened(web, tmp_path, url=url)
    assert opened(web, tmp_path, url=url).shard_sizes.tolist() == [1, 2, 3]
    assert tars(web) == {"other-00.tar": 1, "other-01.tar": 1, "other-02.tar": 2}


def test_shards_of_others_that_changed_are_noticed(
    web: Web, packed: Path, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    foreign(web.folder / "other", make_jpeg)
    url = f"{web.url}/other/other-00.tar"
    opened(web, tmp_path, url=url)
    shutil.rmtree(tmp_path / "c/remote/entries")
    (tmp_path / "c/remote/entries").mkdir()
    shutil.copy(web.folder / "other/other-01.tar", web.folder / "other/other-00.tar")
    with pytest.raises(DataError, match="damaged or replaced"):
        opened(web, tmp_path, url=url).read(0, 0)


def brightness(picture: Picture, generator: np.random.Generator) -> Arrays:
    return {"mean": np.asarray(picture.pixels().mean(), np.float32)}


def test_two_workers_and_two_ranks_fetch_every_shard_once(web: Web, tmp_path: Path) -> None:
    def loader(rank: int) -> tuple[RemoteSamples, Loader]:
        samples = opened(web, tmp_path)
        order = Order(samples.shard_sizes, seed=0, window_shards=2)
        return samples, Loader(
            samples, order, brightness, seed=0, batch_size=8, rank=rank, world=2, workers=2
        )

    (first, left), (second, right) = loader(0), loader(1)
    with closing(first), closing(second), closing(left), closing(right):
        batches = [batch for pair in zip(left, islice(right, 6), strict=False) for batch in pair]
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[: SHARDS * EACH])) == SHARDS * EACH
    assert tars(web) == {f"shard-{number:06d}.tar": 1 for number in range(SHARDS)}


def test_a_copy_for_another_process_reads_the_same(web: Web, tmp_path: Path) -> None:
    samples = opened(web, tmp_path)
    samples.prefetch([0])
    copy = pickle.loads(pickle.dumps(samples))
    samples.close()
    assert everything(copy) == everything(samples)


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert expand_braces("http://[::1]:80/x-{0..1}") == [
        "http://[::1]:80/x-0",
        "http://[::1]:80/x-1",
    ]
    with pytest.raises(UsageError, match="braces do not match"):
        expand_braces("a-{0..1.tar")


def test_shards_of_several_servers_in_one_pattern_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one by one"):
        open_remote(["http://a/x.tar", "http://b/y.tar"], cache=tmp_path, cache_bytes=PLENTY)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str) -> None:
        raise ImportError(f"Install {scheme}fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UsageError, match="pip install fsspec aiohttp s3fs"):
        open_store("s3://bucket/set")
    with pytest.raises(UsageError, match="pip install gcsfs"):
        open_store("gs://bucket/set")


def test_fsspec_stores_list_and_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fsspec's memory file system stands for the object stores: one code path serves them all.
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in packed.iterdir():
        memory.pipe(f"/bucket/set/{file.name}", file.read_bytes())
    try:
        store = FsspecStore("memory://bucket/set/")
        assert store.list_tars("*.tar") == [f"shard-{number:06d}.tar" for number in range(SHARDS)]
        assert remote_stores.read(store, "index.json") == (packed / "index.json").read_bytes()
        with pytest.raises(remote_stores.RemoteError) as caught:
            remote_stores.read(store, "absent")
        assert caught.value.missing and not caught.value.transport
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.mark.slow
def test_object_stores_read_as_what_is_here(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_jpeg: Callable[..., bytes],
) -> None:
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="pictures")
        for file in packed.iterdir():
            client.put_object(Bucket="pictures", Key=f"a b/set/{file.name}", Body=file.read_bytes())
        foreign(tmp_path / "other", make_jpeg)
        for file in (tmp_path / "other").iterdir():
            client.put_object(Bucket="pictures", Key=f"other/{file.name}", Body=file.read_bytes())
        client.close()

        samples = open_samples("s3://pictures/a b/set", cache=tmp_path / "c", cache_bytes=PLENTY)
        assert isinstance(samples, RemoteSamples)
        with closing(samples):
            order = Order(samples.shard_sizes, seed=0, window_shards=2)
            with closing(
                Loader(samples, order, brightness, seed=0, batch_size=8, workers=2)
            ) as loader:
                keys = [key for batch in islice(loader, 3) for key in batch.keys]
            assert len(set(keys)) == SHARDS * EACH
            assert everything(samples) == local(packed, tmp_path)

        for url in ("s3://pictures/other", "s3://pictures/other/other-*.tar"):
            others = open_remote([url], cache=tmp_path / "c", cache_bytes=PLENTY)
            assert others.shard_sizes.tolist() == [1, 2, 3]
            assert everything(others)[4] == ("2-1", make_jpeg(1), "ship")

        with pytest.raises(DataError, match="s3://pictures/nothing/"):
            open_remote(["s3://pictures/nothing"], cache=tmp_path / "c", cache_bytes=PLENTY)
        with pytest.raises(DataError, match="s3://absent/"):
            open_remote(["s3://absent/set"], cache=tmp_path / "c", cache_bytes=PLENTY)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def test_the_lines_learnt_of_foreign_shards_are_plain_json(
    web: Web, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    foreign(web.folder / "other", make_jpeg)
    opened(web, tmp_path, url=f"{web.url}/other/other-{{00..02}}.tar")
    (path,) = (tmp_path / "c/remote/foreign").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line[:2] for line in lines] == [
        ["other-00.tar", 1],
        ["other-01.tar", 2],
        ["other-02.tar", 3],
    ]
