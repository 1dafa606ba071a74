import pytest

from hedwig import faults


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
