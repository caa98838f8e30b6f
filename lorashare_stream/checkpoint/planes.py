"""Byte planes: a lossless coding of tensors, a block at a time.

The bytes of trained floats look random, but for the upper bytes, which hold the exponent. A block of `BLOCK` bytes is
cut into planes (all first bytes of its elements, all second bytes, and so on), and each plane is deflated, or stored as
it is where that is no gain. The stream has for each block the length of each plane, as little-endian uint32, and then
the planes; a plane whose length is that of its elements is stored as it is.

Measured on the classifier heads of real adapters (F32): 0.83 to 0.84 of the raw bytes, at most 0.03 above the entropy
of the planes; deflate without planes 0.93; LZMA of planes 0.84 to 0.87, a hundred times slower. A rotation that moves
exponents into one byte would gain 0.004 more.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable, Iterator

BLOCK = 4 << 20  # bytes of a tensor in memory at once; a multiple of every element's size
MOST = 1032  # bytes that deflate makes of one, at most
_SAMPLE = 1 << 16  # bytes of a plane by which the strategy is chosen


def encoded(chunks: Iterable[bytes | memoryview], itemsize: int) -> Iterator[bytes]:
    """The stream for a tensor whose bytes come in chunks of any size.

    The result depends on the bytes, and on the version of zlib, alone.
    """
    for block in _blocks(chunks):
        planes = [block[i::itemsize] for i in range(itemsize)]
        packed = [min(_deflated(plane), plane, key=len) for plane in planes]
        yield struct.pack(f"<{itemsize}I", *map(len, packed))
        yield from packed


def decoded(stream: bytes, itemsize: int, nbytes: int) -> bytes:
    """The tensor of `nbytes` bytes, from its stream; memory grows with what the stream gives, whatever it claims.

    Raises:
        ValueError: if it is not the stream of a tensor of this size.
    """
    source, blocks = io.BytesIO(stream), []
    for start in range(0, nbytes, BLOCK):
        size = min(BLOCK, nbytes - start) // itemsize
        lengths = struct.unpack(f"<{itemsize}I", _taken(source, 4 * itemsize))
        if max(lengths) > size:
            raise ValueError(f"a plane of {max(lengths)} bytes where {size} are the most")
        block = bytearray(size * itemsize)
        for i, length in enumerate(lengths):
            plane = _taken(source, length)
            block[i::itemsize] = plane if length == size else _inflated(plane, size)
        blocks.append(block)
    if source.read(1):
        raise ValueError("bytes follow the last plane")
    return b"".join(blocks)


def _taken(source: io.BytesIO, count: int) -> bytes:
    taken = source.read(count)
    if len(taken) < count:
        raise ValueError("the stream ends too early")
    return taken


def _blocks(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    buffer = bytearray()
    for chunk in chunks:
        for start in range(0, len(chunk), BLOCK):
            buffer += chunk[start : start + BLOCK]
            if len(buffer) >= BLOCK:
                yield bytes(buffer[:BLOCK])
                del buffer[:BLOCK]
    if buffer:
        yield bytes(buffer)


def _deflated(plane: bytes) -> bytes:
    """A plane, deflated: by Huffman codes alone, 10 times faster and often smaller, unless matches gain on a sample."""
    strategy = min((zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY), key=lambda s: len(_deflated_by(s, plane[:_SAMPLE])))
    return _deflated_by(strategy, plane)


def _deflated_by(strategy: int, raw: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return deflate.compress(raw) + deflate.flush()


def _inflated(raw: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plane = inflate.decompress(raw, size + 1)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if len(plane) != size or not inflate.eof or inflate.unused_data:
        raise ValueError(f"a plane that is not {size} bytes when it is inflated")
    return plane
