"""The ZIP (labels, vocabularies) that tools append behind a flatbuffer: found, kept, written back at its new place.

Nothing is unpacked, so that an archive of zeros which unfolds to gigabytes costs no more than its bytes in the file.
"""

from __future__ import annotations

import struct

_END = struct.Struct("<4s4H2IH")
_ENTRY_LENGTHS = struct.Struct("<3H")
_U32 = struct.Struct("<I")
_SEARCH = _END.size + 65535
_WIDE = 0xFFFFFFFF


def find(data: memoryview) -> bytes:
    """The archive at the end of a file, its offsets counted from its own start; empty without a right one."""
    tail = bytes(data[-_SEARCH:])
    end = len(data) - len(tail) + tail.rfind(b"PK\5\6")
    if end < len(data) - len(tail) or end + _END.size > len(data):
        return b""
    _, _, _, _, count, size, start, comment = _END.unpack_from(data, end)
    # Offsets count from the file's start, or from the archive's own where it was appended as it was.
    base = end - size - start
    if base < 0 or end + _END.size + comment > len(data) or not count or _WIDE in (size, start):
        return b""
    places = []
    at = end - size
    for _ in range(count):
        if at + 46 > end or bytes(data[at : at + 4]) != b"PK\1\2":
            return b""
        places.append((at + 42, base + _U32.unpack_from(data, at + 42)[0]))
        at += 46 + sum(_ENTRY_LENGTHS.unpack_from(data, at + 28))
    first = min(entry for _, entry in places)
    if any(bytes(data[entry : entry + 4]) != b"PK\3\4" for _, entry in places) or not 0 < first < end:
        return b""
    found = bytearray(data[first : end + _END.size + comment])
    for place, entry in places:
        _U32.pack_into(found, place - first, entry - first)
    _U32.pack_into(found, end - first + 16, end - size - first)
    return bytes(found)


def moved(archive: bytes, position: int) -> bytes:
    """The archive for its place in a file: offsets counted from the file's start, as far as 32 bits reach."""
    if not archive or position + len(archive) > _WIDE:
        return archive
    found = bytearray(archive)
    end = archive.rfind(b"PK\5\6")
    _, _, _, _, count, _, start, _ = _END.unpack_from(archive, end)
    at = start
    for _ in range(count):
        _U32.pack_into(found, at + 42, _U32.unpack_from(archive, at + 42)[0] + position)
        at += 46 + sum(_ENTRY_LENGTHS.unpack_from(archive, at + 28))
    _U32.pack_into(found, end + 16, start + position)
    return bytes(found)
