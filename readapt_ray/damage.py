"""Distinguish a damaged file from a temporary failure of a disk or network.

pyarrow raises the same exceptions for both: a Parquet file that is cut short and a busy object store are both OSErrors
without an errno, and some answers of Google's store are plain ArrowExceptions.
"""

import zlib

import pyarrow as pa

READ_ERRORS = (pa.ArrowException, OSError, EOFError, ValueError, zlib.error)
"""All errors that reading a file can raise, for either reason."""
_STORES = ("AWS Error", "google::cloud::Status", "UNAVAILABLE", "Azure Error")


def is_damage(error: Exception) -> bool:
    """Return whether an error of `READ_ERRORS` means that the file's content is damaged, so that a retry cannot help."""
    if isinstance(error, MemoryError) or any(store in str(error) for store in _STORES):
        return False
    return not (isinstance(error, OSError) and error.errno is not None)
