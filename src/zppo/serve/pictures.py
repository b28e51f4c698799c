"""The images of requests: checked before anything else is done with them, kept for as long as the request lives."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from zppo.core.types import ImageRef
from zppo.errors import DataError, one_line
from zppo.images.store import data_of, decode, header_of, keep
from zppo.serve.failure import RequestError

MOST_PIXELS = 1 << 25  # of an image: 100 MB when decoded
DECODERS = 2  # at once
_LONGEST = 300  # characters of what is wrong with an image


@dataclass(frozen=True, slots=True)
class Taken:
    """The images of one request; `release` forgets them."""

    refs: tuple[ImageRef, ...] = ()
    release: Callable[[], None] = lambda: None


def _few() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(DECODERS, thread_name_prefix="zppo-serve-pictures")


@dataclass(frozen=True, slots=True)
class Pictures:
    """Takes the images of requests.

    Attributes:
        folder: where they are kept meanwhile, each request's in a folder of its own.
        most: images of one request.
        blind: why the model is shown none; "" where it is.
        threads: decode them.
    """

    folder: Path
    most: int
    blind: str = ""
    threads: ThreadPoolExecutor = field(default_factory=_few)

    def check(self, urls: Sequence[str]) -> None:
        """Whether so many images may come. RequestError (400) where not."""
        if urls and (self.blind or not self.most):
            raise RequestError(
                400,
                f"the conversation has {len(urls)} image(s), and {self.blind or 'this server takes none'}; send text alone",
                "images_refused",
                param="messages",
            )
        if len(urls) > self.most:
            raise RequestError(
                400,
                f"the conversation has {len(urls)} images; send at most {self.most}",
                "too_many_images",
                param="messages",
            )

    async def take(self, urls: Sequence[str]) -> Taken:
        """Decodes every image once, so that a broken one is refused here and does not fail a batch later.

        Raises:
            RequestError: (400) one is broken, too large, or no image.
        """
        if not urls:
            return Taken()
        return await asyncio.get_running_loop().run_in_executor(self.threads, self._take_all, urls)

    def _take_all(self, urls: Sequence[str]) -> Taken:
        folder = self.folder / uuid.uuid4().hex

        def release() -> None:
            shutil.rmtree(folder, ignore_errors=True)

        refs = []
        try:
            for number, url in enumerate(urls, 1):
                refs.append(_take(url, f"{number} of the conversation", folder))
        except DataError as error:
            release()
            raise RequestError(400, one_line(error, _LONGEST), "invalid_image", param="messages") from None
        except BaseException:
            release()
            raise
        return Taken(tuple(refs), release)


def _take(url: str, name: str, folder: Path) -> ImageRef:
    data = data_of(url)
    header = header_of(data, name)
    if header.width * header.height > MOST_PIXELS:
        raise DataError(
            f"the image {name} has {header.width:,} x {header.height:,} pixels; send one of at most {MOST_PIXELS:,} pixels"
        )
    decode(data, name)
    return keep(data, folder)
