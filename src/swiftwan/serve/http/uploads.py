"""Images and clips that clients bring: known by their first bytes, measured before anything decodes them.

Decoding happens in the worker. Here only headers are read, by code of our own: a decoder is the last thing
that unknown bytes should reach in the process that holds the key.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from swiftwan.serve.http.answers import ApiError, wrong_field

MAX_PIXELS = 64 * 10**6
_CHUNK = 2**20


@dataclass(frozen=True)
class Upload:
    """A file of a call. ``field`` is where it came from; its client's name is not even read."""

    field: str
    file: BinaryIO

    def chunks(self) -> Iterator[bytes]:
        self.file.seek(0)
        while chunk := self.file.read(_CHUNK):
            yield chunk

    @cached_property
    def seen(self) -> tuple[str, tuple[int, int] | None]:
        """The ending that its content calls for, and its width and height; None for a clip.

        Raises:
            ApiError: 400: no PNG, JPEG, WebP or MP4, a broken header, or too many pixels.
        """
        self.file.seek(0)
        head = self.file.read(32)
        try:
            if head.startswith(b"\x89PNG\r\n\x1a\n"):
                return ".png", self._checked(_png_size(head))
            if head.startswith(b"\xff\xd8\xff"):
                return ".jpg", self._checked(_jpeg_size(self.file))
            if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
                return ".webp", self._checked(_webp_size(head))
        except (struct.error, ValueError):
            raise wrong_field(self.field, f"{self.field} is damaged: its header gives no size.") from None
        if head[4:8] == b"ftyp":
            return ".mp4", None
        raise wrong_field(self.field, f"{self.field} is no PNG, JPEG or WebP image, nor an MP4 clip.")

    @property
    def ending(self) -> str:
        return self.seen[0]

    def _checked(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = size
        if not 0 < width * height <= MAX_PIXELS:
            raise wrong_field(
                self.field, f"{self.field} is {width}x{height}; at most {MAX_PIXELS // 10**6} million pixels are taken."
            )
        return size


def from_data_url(field: str, url: str) -> Upload:
    """Read a data: URL. Others are not fetched: whom a server can reach is no business of its clients.

    Raises:
        ApiError: 400: another kind of URL, or broken base64.
    """
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise wrong_field(field, f"{field} must be an uploaded file or a base64 data: URL; other URLs are not fetched.")
    try:
        return Upload(field, io.BytesIO(base64.b64decode(data, validate=True)))
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{field} is broken base64.", code="invalid_value", param=field) from None


def _png_size(head: bytes) -> tuple[int, int]:
    if head[12:16] != b"IHDR":
        raise ValueError
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def _jpeg_size(file: BinaryIO) -> tuple[int, int]:
    """Walk the segments up to the frame header."""
    file.seek(2)
    while True:
        marker = struct.unpack(">BB", file.read(2))
        if marker[0] != 0xFF:
            raise ValueError
        if marker[1] == 0xFF:  # a fill byte
            file.seek(-1, io.SEEK_CUR)
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if 0xC0 <= marker[1] <= 0xCF and marker[1] not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack(">BHH", file.read(5))
            return width, height
        if length < 2:
            raise ValueError
        file.seek(length - 2, io.SEEK_CUR)


def _webp_size(head: bytes) -> tuple[int, int]:
    match head[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
        case b"VP8L" if head[20] == 0x2F:
            bits = int.from_bytes(head[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if head[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack("<HH", head[26:30])
            return width & 0x3FFF, height & 0x3FFF
    raise ValueError
