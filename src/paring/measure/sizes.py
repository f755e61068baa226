"""What a model takes on disk, and on the way there: as it is, after zip, after zstd."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

ZIP_LEVEL, ZSTD_LEVEL = 9, 9  # beyond 9 zstd takes a hundred times as long, for half a percent
_CHUNK = 2**20


def stored_bytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in _files(path))


def zip_bytes(path: Path) -> int:
    """Bytes of a ZIP archive (deflate, level 9) of a file or a folder; nothing is written.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "zeros"
    >>> file.write_bytes(bytes(100_000))
    100000
    >>> 100 < zip_bytes(file) < 500
    True
    """
    sink = _Counter()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, True, ZIP_LEVEL, strict_timestamps=False) as archive:
        for file in _files(path):
            archive.write(file, file.relative_to(path.parent).as_posix())
    return sink.count


def zstd_bytes(path: Path) -> int:
    """Bytes after zstd, level 9; the files of a folder one after the other."""
    import zstandard

    packer = zstandard.ZstdCompressor(ZSTD_LEVEL).compressobj()
    return sum(len(packer.compress(chunk)) for chunk in _chunks(path)) + len(packer.flush())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _chunks(path: Path) -> Iterator[bytes]:
    for file in _files(path):
        with file.open("rb") as source:
            while chunk := source.read(_CHUNK):
                yield chunk


class _Counter(io.RawIOBase):
    """A file that only counts what is written to it."""

    count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        self.count += size
        return size


__all__ = ["stored_bytes", "zip_bytes", "zstd_bytes"]
