"""The frames of an animated WebP that each stand alone, without decoding those before them.

Pillow decodes an animation from its start, into RGBA. Where every frame is a whole opaque picture, as in a frame cache
(pretrain/frame_cache.py), each is a still WebP in all but its header.
"""

import struct

_RIFF_HEADER = 12  # "RIFF", size, "WEBP"
_FRAME_HEADER = 16  # of an ANMF chunk: left, top, width, height, milliseconds (3 bytes each), flags


def standing_frames(content: bytes) -> list[tuple[float, bytes]] | None:
    """Milliseconds and the still WebP of every frame; None if a frame builds on others, or anything is unusual.

    Format: https://developers.google.com/speed/webp/docs/riff_container
    """
    canvas: bytes | None = None
    frames: list[tuple[float, bytes]] = []
    chunks = _chunks(content, _RIFF_HEADER)
    if chunks is None:
        return None
    for name, payload in chunks:
        if name == b"VP8X":
            canvas = payload[4:10]
        elif name == b"ANMF":
            inside = _chunks(payload, _FRAME_HEADER)
            covers = payload[:12] == b"\0" * 6 + canvas if canvas else False
            if not covers or not inside or [part for part, _ in inside] != [b"VP8 "]:
                return None  # lossless frames may be transparent, others may lie on the frame before
            frames.append((float(int.from_bytes(payload[12:15], "little")), _still(inside[0][1])))
    return frames or None


def _still(payload: bytes) -> bytes:
    chunk = b"VP8 " + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _chunks(content: bytes, start: int) -> list[tuple[bytes, bytes]] | None:
    """Names and payloads of RIFF chunks from `start` on; None if the last is cut off."""
    found: list[tuple[bytes, bytes]] = []
    while start + 8 <= len(content):
        name, size = content[start : start + 4], int.from_bytes(content[start + 4 : start + 8], "little")
        if start + 8 + size > len(content):
            return None
        found.append((name, content[start + 8 : start + 8 + size]))
        start += 8 + size + size % 2
    return found
