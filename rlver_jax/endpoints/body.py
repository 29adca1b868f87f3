"""The body of a response, as long as it is no longer than an answer can be: whatever is sent, memory stays flat.

httpx decodes as well, but keeps without a bound what stands behind the end of a compressed stream, and stacks codings.
"""

import contextlib
import zlib

import httpx2 as httpx

# Bytes, as they come and decoded. A long answer has 0.1 MB; whoever asks for logprobs of every token may get some MB.
LONGEST = 8 * 2**20
CODINGS = "gzip, deflate"  # what we ask for, and decode
HEADER = 2  # bytes that tell zlib's format and gzip's from bare deflate


class BodyFault(Exception):
    """A body that cannot be read, or is too long to be."""


async def read_body(response: httpx.Response) -> tuple[bytes, bool]:
    """(the decoded body, whether that is all of it).

    Args:
        response: of a stream; should be closed afterwards, since it may not have been read to its end.

    Raises:
        BodyFault: it is encoded in another way than asked for, or not as it says.
        httpx.RequestError: the connection failed.
    """
    length = response.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 15 or int(length) > LONGEST):
        return b"", False
    decoder, body, received = _Decoder(response.headers.get("content-encoding", "")), bytearray(), 0
    async with contextlib.aclosing(response.aiter_raw()) as chunks:
        async for chunk in chunks:
            received += len(chunk)
            body += decoder.decoded(chunk, LONGEST + 1 - len(body))
            if max(received, len(body)) > LONGEST:
                return bytes(body[:LONGEST]), False
    if not decoder.complete:
        raise BodyFault(f"a body that ends in the middle of its {decoder.coding} coding")
    return bytes(body), True


class _Decoder:
    """Undoes a content coding chunk by chunk; what stands behind its end is dropped."""

    def __init__(self, coding: str):
        self.coding = coding.strip().lower() or "identity"
        if self.coding not in ("identity", "gzip", "x-gzip", "deflate"):
            raise BodyFault(f"a body encoded as {self.coding[:40]!r}; expected {CODINGS} or none")
        self._stream = None if self.coding == "identity" else zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
        self._head = b""  # what has come before a header can be told
        self._begun = False

    def decoded(self, chunk: bytes, most: int) -> bytes:
        """What a chunk decodes to: its first `most` bytes."""
        if self._stream is None:
            return chunk[:most]
        if self._stream.eof:
            return b""
        if not self._begun:
            self._head = chunk = self._head + chunk
            if len(chunk) < HEADER:
                return b""
            self._begun = True
            if self.coding == "deflate" and not _has_header(chunk):
                self._stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # some servers leave out zlib's header
        try:
            return self._stream.decompress(chunk, most)
        except zlib.error as error:
            raise BodyFault(f"a body that is not {self.coding}, as it says ({error})") from None

    @property
    def complete(self) -> bool:
        """Whether the coding has come to its end."""
        return self._stream is None or self._stream.eof or not self._head


def _has_header(data: bytes) -> bool:
    """Whether data begins as zlib's or gzip's format does, not with bare deflate."""
    try:
        zlib.decompressobj(wbits=32 + zlib.MAX_WBITS).decompress(data[:HEADER])
    except zlib.error:
        return False
    return True
