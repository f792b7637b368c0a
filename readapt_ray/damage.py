"""Tell a damaged file from a disk or network that failed for the moment.

pyarrow tells both by the same exceptions: a Parquet file cut short and a busy object store are OSErrors without a
number, and some answers of Google's store are plain ArrowExceptions.
"""

import zlib

import pyarrow as pa

READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, zlib.error)
"""What reading a file raises, whatever is at fault."""
_STORES = ("AWS Error", "google::cloud::Status", "UNAVAILABLE", "Azure Error")


def is_damage(error: Exception) -> bool:
    """Return whether one of `READ_ERRORS` is about the file's content, so that reading again would raise it again."""
    if isinstance(error, MemoryError) or any(store in str(error) for store in _STORES):
        return False
    return not (isinstance(error, OSError) and error.errno is not None)
