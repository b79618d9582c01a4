"""Zstandard files as a stream of bytes, through pyarrow (Python itself reads them from 3.14 on)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

from btx_megatron.data.parquet import import_pyarrow


def open_zstandard(path: Path) -> IO[bytes]:
    """Open a ``.zst`` file; seeking back starts over, as with gzip. Raises UserError without pyarrow."""
    return io.BufferedReader(_Unpacked(path), 1 << 18)


class _Unpacked(io.RawIOBase):
    """The unpacked bytes. Seeking forward reads and drops what lies between."""

    def __init__(self, path: Path) -> None:
        self._pyarrow = import_pyarrow(path)
        self._path = path
        self._stream: Any = None
        self._at = 0
        self._start_over()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("a packed file does not know its end")
        if target < self._at:
            self._start_over()
        while self._at < target:
            part = self._stream.read(min(target - self._at, 1 << 20))
            if not part:
                break
            self._at += len(part)
        return self._at

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()

    def _start_over(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._pyarrow.input_stream(str(self._path), compression="zstd")
        self._at = 0
