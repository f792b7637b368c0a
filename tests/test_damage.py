"""Which exceptions speak of a file, and which of the disk or network that it lies on."""

import errno
import zlib

import pyarrow as pa
import pytest

from readapt_ray.damage import READ_ERRORS, is_damage


@pytest.mark.parametrize(
    "error",
    [
        OSError("Couldn't deserialize thrift: TProtocolException: Invalid data"),
        OSError("Corrupt snappy compressed data."),
        OSError("Truncated compressed stream"),
        pa.ArrowInvalid("Parquet magic bytes not found in footer."),
        pa.ArrowNotImplementedError("Support for codec 'x' not built"),
        EOFError(),
        zlib.error("Error -3 while decompressing data"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"),
    ],
)
def test_of_the_file(error):
    assert isinstance(error, READ_ERRORS)
    assert is_damage(error)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, "said by the system") for number in (errno.EIO, errno.ENOSPC, errno.ETIMEDOUT)),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        OSError("When reading information: AWS Error SLOW_DOWN during GetObject operation: Please reduce"),
        OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28"),
        pa.ArrowException("google::cloud::Status(UNAVAILABLE: Permanent error in Read())"),
        pa.ArrowInvalid("google::cloud::Status(INVALID_ARGUMENT: try again)"),
        OSError("GetProperties failed. Azure Error: [ServerBusy] 503"),
        pa.lib.ArrowMemoryError("malloc of size 64 failed"),
    ],
)
def test_of_the_disk_or_network(error):
    assert isinstance(error, READ_ERRORS)
    assert not is_damage(error)
