"""Images as they are sent to a teacher's servers: made in threads, once for the completions and repeats of a request."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from zppo.core.types import ImageRef
from zppo.images.store import PixelLimits, request_url

ENCODERS = 4  # images decoded at once, of up to 200 MB each
MOST_HELD = 64 << 20  # characters that are kept for requests to come, beside those of the requests under way


class Sending:
    """Makes `data:` URLs of images, and keeps the last ones: a server that gives one choice at a time is sent an image G_T times.

    Of one event loop.

    Args:
        limits: of the pixels of an image.
        most: characters of URLs that are kept.
    """

    def __init__(self, limits: PixelLimits, most: int = MOST_HELD) -> None:
        self._limits, self._most = limits, most
        self._encoding = asyncio.Semaphore(ENCODERS)
        self._making: dict[ImageRef, asyncio.Task[str]] = {}
        self._kept: OrderedDict[ImageRef, str] = OrderedDict()

    async def url(self, ref: ImageRef) -> str:
        """The image as it is sent. DataError as `request_url`."""
        if ref in self._kept:
            self._kept.move_to_end(ref)
            return self._kept[ref]
        if ref not in self._making:
            self._making[ref] = asyncio.create_task(self._make(ref))
        return await asyncio.shield(self._making[ref])  # others may wait for it where one is cancelled

    async def _make(self, ref: ImageRef) -> str:
        try:
            async with self._encoding:
                made = self._kept[ref] = await asyncio.to_thread(request_url, ref, self._limits)
        finally:
            del self._making[ref]
        while sum(map(len, self._kept.values())) > self._most:
            self._kept.popitem(last=False)
        return made
