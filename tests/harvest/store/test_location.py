"""Stores elsewhere: an S3 server on loopback, and the names of places."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harvest.config import HarvestConfig
from harvest.run import harvest
from harvest.store import (
    as_it_was,
    before,
    create_store,
    expect_from,
    from_bits,
    open_store,
    to_bits,
    verify_store,
)
from harvest.store.location import Location
from tests.harvest.synthetic import content, make_spec, write


@pytest.fixture(scope="module")
def bucket():
    """A bucket on a real S3 server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        client.create_bucket(Bucket="activations")
        yield client
    server.stop()


def test_a_store_behind_a_url_is_written_cut_off_and_read(bucket):
    url = "s3://activations/runs/first"
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store(url, spec)
    write(writer, 1, activations, pictures)
    again = create_store(Path(url), spec)  # a Path loses a slash
    assert again.pending() == [0, 2]
    for shard in again.pending():
        write(again, shard, activations, pictures)
    store = open_store(url)
    assert str(store.path) == url and store.done.all()
    for site in spec.sites:
        expected = from_bits(to_bits(activations[site]))
        np.testing.assert_array_equal(store.read(site, [7, 2]), expected[[7, 2]])
    np.testing.assert_array_equal(store.pictures(), pictures)
    assert verify_store(store, progress=False) == []
    with pytest.raises(ValueError, match=r"s3://activations/runs/first holds a store with images"):
        create_store(url, make_spec(12))


def test_one_that_was_cut_off_while_it_was_made_is_made_again(bucket):
    url = "s3://activations/runs/draft"
    create_store(url, make_spec(sites={"double.7.img": (12, 8)}))
    body = b'{"zarr_format":3,"node_type":"group","attributes":{"format":"jaxdict-activations","draft":true}}'
    bucket.put_object(Bucket="activations", Key="runs/draft/zarr.json", Body=body)
    with pytest.raises(ValueError, match="whose making was cut off; run its harvest again"):
        open_store(url)
    assert create_store(url, make_spec()).pending() == [0, 1, 2]
    assert open_store(url).images == 11
    assert not any("double.7.img" in key for key in Location(url).files())


def test_harvested_there_it_is_what_a_folder_would_hold(bucket, tmp_path):
    config = HarvestConfig(
        out=Path("s3://activations/harvest"),
        images=3,
        steps=1,
        batch=2,
        images_per_shard=2,
        max_sequence_length=16,
        device="cpu",
    )
    summary = harvest(config)
    assert summary["store"] == "s3://activations/harvest"
    harvest(HarvestConfig(**{**vars(config), "out": tmp_path / "s"}))
    there, here = open_store("s3://activations/harvest"), open_store(tmp_path / "s")
    assert there.fingerprint == here.fingerprint
    np.testing.assert_array_equal(there.read("double.2.img"), here.read("double.2.img"))
    listed = bucket.list_objects_v2(Bucket="activations")["Contents"]
    assert "harvest.config.json" in [entry["Key"] for entry in listed]


def test_a_store_there_grows_and_tells_what_it_held(bucket, tmp_path):
    config = HarvestConfig(
        out=Path("s3://activations/grows"),
        sites=("double.2.img",),
        images=3,
        steps=1,
        batch=2,
        images_per_shard=4,
        max_sequence_length=16,
        device="cpu",
    )
    harvest(config)
    url, more = "s3://activations/grows", {"images": 5, "sites": ("double.2.img", "double.1.txt")}
    first = open_store(url).fingerprint
    assert harvest(replace(config, **more))["made"] == 2
    harvest(replace(config, out=tmp_path / "s", **more))
    there, here = open_store(url), open_store(tmp_path / "s")
    assert there.fingerprint == here.fingerprint and there.sites == here.sites
    for site in here.sites:
        np.testing.assert_array_equal(there.read(site), here.read(site))
    assert verify_store(there, progress=False) == []
    held = before(there, first)
    assert held is not None and (held.images, held.sites) == (3, ("double.2.img",))
    assert as_it_was(there, held).read("double.2.img").shape[0] == 3
    listed = [entry["Key"] for entry in bucket.list_objects_v2(Bucket="activations")["Contents"]]
    assert "grows.passes.json" in listed and not [key for key in listed if "lock" in key]
    bucket.delete_object(Bucket="activations", Key="grows.passes.json")
    with pytest.raises(ValueError, match=r"no s3://activations/grows.passes.json that says"):
        expect_from(there, first, "it")


def test_a_file_that_is_lost_there_is_noticed_and_rows_of_zeros_are_not_taken_for_one(bucket):
    url = "s3://activations/lost"
    spec = make_spec()
    activations, pictures = content(spec)
    activations["double.2.img"][:] = 0
    writer = create_store(url, spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    store = open_store(url)
    assert not store.read("double.2.img").any()
    lost = "sites/double.2.txt/c/1/0/0/0"
    bucket.delete_object(Bucket="activations", Key=f"lost/{lost}")
    with pytest.raises(ValueError, match=r"double.2.txt, .*c/1/0/0/0 is missing.*--verify"):
        store.read("double.2.txt", [0, 6])
    store.read("double.2.txt", [0, 9])
    problems = verify_store(store, progress=False)
    assert problems == [f"sites/double.2.txt, images 4 to 7 is missing: {lost}"]


@pytest.mark.parametrize("where", ["s3://activations/files", "a folder"])
def test_files_by_name(bucket, tmp_path, where):
    place = Location(where if "://" in where else tmp_path / where)
    assert list(place.files()) == [] and not place.exists()
    place.put({"a/b/c": b"1", "a/b.c/d": b"2", "e": b"3"})
    assert sorted(place.files()) == ["a/b.c/d", "a/b/c", "e"]
    assert list(place.files("a/b")) == ["c"] and list(place.files("f")) == []
    assert place.holds("a/b/c") and not place.holds("a/b") and not place.holds("a/b/d")
    place.put({"e": b"4"})
    place.remove(["a/b/c", "e"])
    place.remove([])
    assert list(place.files()) == ["a/b.c/d"]


def test_nothing_and_no_bucket_are_told(bucket):
    with pytest.raises(ValueError, match="expected an activation store at s3://activations/no"):
        open_store("s3://activations/no")
    with pytest.raises(OSError, match="s3://missing/x cannot be listed"):
        open_store("s3://missing/x")
    with pytest.raises(ValueError, match=r"expected a folder or a URL .* got ftp://host/x"):
        open_store("ftp://host/x")


def test_a_server_that_goes_away_is_told_in_one_line(bucket, monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="brief")
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store("s3://brief/x", spec)
    write(writer, 0, activations, pictures)
    store = open_store("s3://brief/x")
    assert store.done.any()
    server.stop()
    with pytest.raises(OSError, match=r"images 4 to 7 could not be written to s3://brief/x: "):
        write(writer, 1, activations, pictures)
    with pytest.raises(ValueError, match=r"sites/double.2.txt, .* s3://brief/x cannot be read"):
        store.read("double.2.txt", [0])


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("runs/store", "runs/store"),
        ("S3://bucket/a/", "s3://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("C:/store", "C:/store"),
    ],
)
def test_places_by_name(given, shown):
    assert str(Location(given)) == shown


def test_a_text_file_is_replaced_at_once(tmp_path):
    place = Location(tmp_path / "a.json")
    place.write_text("one")
    with contextlib.suppress(UnicodeEncodeError):
        place.write_text("\ud800")
    assert (tmp_path / "a.json").read_text() == "one"
