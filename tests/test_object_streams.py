"""Streams into an object store that hold what is small."""

from pathlib import Path

import pyarrow.fs as pafs

from readapt_ray import object_streams
from readapt_ray.object_streams import Upload


def test_what_is_too_much_for_one_request_goes_to_the_temporary_name(tmp_path: Path) -> None:
    """Up to 4 MiB are held and put at once; with one byte more, all bytes go to the store, and memory is free again."""
    most = object_streams._MAX_HELD_BYTES
    for num_bytes, is_small in ((most, True), (most + 1, False)):
        temporary, final = tmp_path / f"{num_bytes}.tmp", tmp_path / f"{num_bytes}"
        upload = Upload(pafs.LocalFileSystem(), str(temporary))
        with upload:
            upload.write(b"x" * 1000)
            upload.write(b"y" * (num_bytes - 1000))
        assert (upload.is_small, temporary.exists(), upload.tell()) == (is_small, not is_small, num_bytes)
        if is_small:
            upload.put(str(final))
        content = (final if is_small else temporary).read_bytes()
        assert content == b"x" * 1000 + b"y" * (num_bytes - 1000)
