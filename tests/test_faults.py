import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_s3 import FakeS3
from faulty_proxy import FaultyProxy

from hedwig import faults, storage


@pytest.mark.parametrize(
    ("error", "temporary"),
    [
        (OSError("When reading information for key 'a' in bucket 'b': AWS Error SLOW_DOWN during HeadObject"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 500) during PutObject operation"), True),
        (
            OSError("cannot read s3://b/k: An error occurred (503) when calling GetObject"),
            True,
        ),
        (OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached"), True),
        (OSError("cannot read s3://b/k: IncompleteReadError: 12 read, but total bytes expected is 24."), True),
        (OSError("cannot read s3://b/500.jpg: NoSuchKey: it does not exist (404)"), False),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), False),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError("timed out"), False),
        (ValueError("timed out"), False),
    ],
)
def test_what_is_tried_again(error, temporary):
    assert faults.is_temporary(error) is temporary


def test_temporary_faults_are_counted_and_end(monkeypatch):
    monkeypatch.setattr(faults, "FIRST_PAUSE_S", 0.0)
    calls = []

    @faults.retried
    def flaky(num):
        calls.append(num)
        if len(calls) < num:
            raise OSError("AWS Error SLOW_DOWN")
        return "done"

    before = faults.num_retries()
    assert flaky(4) == "done"
    assert faults.num_retries() - before == 3
    calls.clear()
    with pytest.raises(OSError, match="SLOW_DOWN"):
        flaky(100)
    assert len(calls) == faults.ATTEMPTS

    @faults.retried
    def gone():
        calls.append(0)
        raise FileNotFoundError("no image file")

    calls.clear()
    with pytest.raises(FileNotFoundError):
        gone()
    assert len(calls) == 1


OPEN = b"open" * 1000


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """No settings of whoever runs the tests, and keys that must not be used where nothing is to be signed."""
    for name in (*faults.VARIABLES, "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.fixture
def store(clean):
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"pano_id": ["b", "a"]}), table)
    objects = {"open/deep/a.jpg": OPEN, "open/t/part-0.parquet": table.getvalue().to_pybytes(), "own/b.jpg": b"own"}
    with FakeS3(objects, public={"open"}) as fake:
        clean.setenv("AWS_ENDPOINT_URL", fake.url)
        yield fake


def apply(monkeypatch, **settings):
    for name, value in faults.storage_variables(**settings).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("anonymous", [True, ["s3://open/", "gs://other"]])
def test_a_public_bucket_is_read_without_signing(store, clean, anonymous):
    with pytest.raises(OSError, match="AccessDenied"):
        storage.read_bytes("s3://open/deep/a.jpg")
    with pytest.raises(OSError, match=r"ACCESS_DENIED|AccessDenied"):
        storage.list_files("s3://open/deep")
    apply(clean, anonymous=anonymous)
    store.seen.clear()
    assert storage.read_bytes("s3://open/deep/a.jpg") == OPEN
    assert storage.list_files("s3://open", recursive=True) == ["s3://open/deep/a.jpg", "s3://open/t/part-0.parquet"]
    assert storage.list_files("s3://open/deep") == ["s3://open/deep/a.jpg"]
    assert storage.read_table("s3://open/t")["pano_id"].to_pylist() == ["a", "b"]
    assert len(store.seen) >= 4
    assert {who for _, _, who in store.seen} == {"nobody"}
    if anonymous is True:
        with pytest.raises(OSError, match="AccessDenied"):
            storage.read_bytes("s3://own/b.jpg")
    else:  # the other buckets are signed for as before
        assert storage.read_bytes("s3://own/b.jpg") == b"own"
        assert storage.exists("s3://own/b.jpg")
        assert {who for _, path, who in store.seen if path.startswith("own")} == {"us-east-1"}


def test_endpoint_and_region_reach_both_libraries(store, clean):
    clean.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # what settings say wins over it
    clean.setenv("AWS_REGION", "eu-west-9")
    apply(clean, endpoint_url=store.url, region="eu-central-7")
    assert storage.read_bytes("s3://own/b.jpg") == b"own"
    assert storage.list_files("s3://own") == ["s3://own/b.jpg"]
    assert {who for _, _, who in store.seen} == {"eu-central-7"}
    assert {method for method, _, _ in store.seen} >= {"GET"}


@pytest.mark.parametrize("attempts", [1, 4])  # 3 is what a pickled filesystem does if nobody says
def test_max_attempts_is_what_both_libraries_do(store, clean, attempts):
    clean.setattr(faults, "FIRST_PAUSE_S", 0.0)
    clean.setattr("faulty_proxy.FAULTS", ("503",))
    with FaultyProxy(store.url, share=1.0) as proxy:
        apply(clean, endpoint_url=proxy.url, max_attempts=attempts)
        before = faults.num_retries()
        with pytest.raises(OSError, match="SlowDown"):
            storage.read_bytes("s3://own/b.jpg")
        assert proxy.num_requests == attempts
        assert faults.num_retries() - before == attempts - 1
        fs, inner = storage.filesystem("s3://own/b.jpg")
        for one in (fs, pickle.loads(pickle.dumps(fs))):  # Ray's workers get a pickled one
            proxy.num_requests = 0
            with pytest.raises(OSError, match=r"503|SLOW_DOWN"):
                one.open_input_file(inner)
            assert proxy.num_requests == attempts


@pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")
def test_a_google_bucket_is_opened_without_credentials(clean):
    apply(clean, anonymous=["gs://open"])
    fs, inner = faults.remote_filesystem("gs://open/deep/a.jpg")
    assert (fs.type_name, inner) == ("gcs", "open/deep/a.jpg")
    assert "'anonymous': True" in str(fs.__reduce__())
    client = faults.open_options("gs://open/deep/a.jpg")["client"]
    assert type(client._credentials).__name__ == "AnonymousCredentials"
    assert faults.open_options("gs://own/a.jpg") == {}
    assert not faults.is_anonymous("gs://open-too/a.jpg")


def test_settings_that_cannot_be_meant():
    assert faults.storage_variables() == {}
    assert faults.storage_variables(anonymous=False) == {"HEDWIG_ANONYMOUS": "0"}
    for wrong in ("store:9000", "ftp://store", "https://a b"):
        with pytest.raises(ValueError, match=r"endpoint_url is .*https://host:port"):
            faults.storage_variables(endpoint_url=wrong)
    with pytest.raises(ValueError, match="Credentials belong") as refused:
        faults.storage_variables(endpoint_url="https://key:hush@store")
    assert "hush" not in str(refused.value)
    with pytest.raises(ValueError, match=r"'open-data'; a bucket is written s3://NAME"):
        faults.storage_variables(anonymous=["open-data"])
    with pytest.raises(ValueError, match="at least 1"):
        faults.storage_variables(max_attempts=0)


def test_a_wrong_number_of_attempts_names_the_variable(clean):
    assert faults.max_attempts() == faults.ATTEMPTS
    for wrong in ("0", "many", "-1", "2.5"):
        clean.setenv("AWS_MAX_ATTEMPTS", wrong)
        with pytest.raises(ValueError, match=f"AWS_MAX_ATTEMPTS is '{wrong}'"):
            faults.max_attempts()
