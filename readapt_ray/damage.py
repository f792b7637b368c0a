"""Whether a file that cannot be read is damaged itself, or the disk or network that it lies on failed for now.

pyarrow tells both by the same exceptions: a Parquet file cut short and a busy object store are OSErrors without a
number, and some answers of Google's store are plain ArrowExceptions.
"""

import zlib

import pyarrow as pa

READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, zlib.error)
"""What reading a file raises, whatever is at fault."""
_STORES = ("AWS Error", "google::cloud::Status", "UNAVAILABLE", "Azure Error")


def is_damage(error: Exception) -> bool:
    """Whether one of `READ_ERRORS` speaks of the file's content; reading again would raise it again."""
    if isinstance(error, MemoryError) or any(store in str(error) for store in _STORES):
        return False
    return not (isinstance(error, OSError) and error.errno is not None)
