"""Pictures and clips of a question on their way to a server: within the pixel limits, as `data:` URLs, frames in time order."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image

from zppo.core.parts import message_parts
from zppo.core.types import ImageRef
from zppo.errors import DataError, UnavailableError, one_line
from zppo.evals.item import Item, Media, conversation
from zppo.evals.options import LIMITS
from zppo.images.store import as_url, keep, reference, request_url, rgb
from zppo.names import check_file
from zppo.prompts import PromptBook

MOST_VIDEO = 1 << 28  # bytes of a clip that is sent whole
_KINDS = {".mp4": "mp4", ".mov": "mov", ".mpeg": "mpeg", ".mpg": "mpeg", ".webm": "webm", ".mkv": "x-matroska", ".avi": "x-msvideo"}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ContentPart:
    """A piece of a turn: a text, or the `data:` URL of an image or a video."""

    kind: Literal["text", "image", "video"]
    value: str


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A turn as it is sent."""

    role: str
    parts: tuple[ContentPart, ...]


def chat_turns(item: Item, book: PromptBook, *, store: Path, as_file: bool, frames: int) -> list[ChatTurn]:
    """The conversation that asks a question.

    Frames, or the clip, stand before the texts of the last turn; images at their marks.

    Args:
        store: where pictures are kept that came without a file, and the frames of clips.
        as_file: a clip goes whole to a server that takes videos; a part of a clip always goes as frames.
        frames: most frames of a video that are sent, evenly spaced from the first to the last.

    Raises:
        DataError: a picture or a clip cannot be read.
        UnavailableError: frames of a clip are wanted, and the package that decodes it is missing; or it is too large to be sent whole.
    """
    refs = tuple(_ref(media, store) for media in item.images)
    turns = [
        ChatTurn(
            t.role, tuple(ContentPart("text", p) if isinstance(p, str) else ContentPart("image", request_url(p, LIMITS)) for p in t.parts)
        )
        for t in message_parts(conversation(item, book), refs)
    ]
    before: list[ContentPart] = []
    if item.video is not None and as_file and item.clip is None:
        before = [ContentPart("video", _video_url(item.video))]
    elif item.video is not None:
        before = [ContentPart("image", request_url(ref, LIMITS)) for ref in _decoded(item.video, item.clip, frames, store)]
    elif item.frames:
        before = [ContentPart("image", request_url(_ref(f, store), LIMITS)) for f in spread(item.frames, frames)]
    if before:
        turns[-1] = ChatTurn(turns[-1].role, (*before, *turns[-1].parts))
    return turns


def spread(values: Sequence[_T], most: int) -> list[_T]:
    """At most so many of the values, evenly spaced from the first to the last, in order; the middle one where one is wanted."""
    count = min(most, len(values))
    if count == 1:
        return [values[len(values) // 2]]
    return [values[i * (len(values) - 1) // (count - 1)] for i in range(count)]


def small_picture(url: str, side: int) -> str:
    """A picture for a transcript, as a `data:` URL: a JPEG whose longer side is at most so many pixels.

    `url` itself where that is shorter, or where the picture is broken, which its server may well not mind.
    """
    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            picture.draft("RGB", (side, side))
            small = rgb(picture)
            small.thumbnail((side, side))
        small.save(out, "JPEG", quality=80)
    except Exception:  # decoders fail in many ways
        return url
    shown = as_url(out.getvalue(), "image/jpeg")
    return shown if len(shown) < len(url) else url


def media_names(item: Item, folder: Path) -> list[str]:
    """The files of a question's pictures, frames and clip, those below `folder` relative to it; bytes by their digest."""
    names = [media if isinstance(media, Path) else hashlib.sha256(media).hexdigest() for media in (*item.images, *item.frames)]
    files = [*names, *([item.video] if item.video else [])]
    return [
        each if isinstance(each, str) else (each.relative_to(folder) if each.is_relative_to(folder) else each).as_posix() for each in files
    ]


def media_key(item: Item) -> list[Any]:
    """What names the media of a question in its key: digests of pictures, name and size of a clip. Reads the pictures."""
    pictures = [_digest(media) for media in (*item.images, *item.frames)]
    clip = [item.video.name, item.video.stat().st_size if item.video.is_file() else 0] if item.video else []
    return [pictures, clip, item.clip]


def media_there(item: Item) -> bool:
    """Whether every file of a question can be read; what is in it is another matter."""
    files = [media for media in (*item.images, *item.frames, item.video) if isinstance(media, Path)]
    return all(path.is_file() and os.access(path, os.R_OK) for path in files)


def _digest(media: Media) -> str:
    """SHA-256, "" for a file that cannot be read: who wants to send it will say so."""
    try:
        data = media.read_bytes() if isinstance(media, Path) else media
    except OSError:
        return ""
    return hashlib.sha256(data).hexdigest()


def _ref(media: Media, store: Path) -> ImageRef:
    return reference(media)[0] if isinstance(media, Path) else keep(media, store)


def _video_url(path: Path) -> str:
    check_file(path, DataError)
    try:
        data = path.read_bytes() if path.stat().st_size <= MOST_VIDEO else b""
    except OSError as error:
        raise DataError(f"the clip {path} cannot be read ({error.strerror or error}): put it back") from error
    if not data:
        if path.stat().st_size:
            raise UnavailableError(f"the clip {path} has more than {MOST_VIDEO >> 20} MiB; send frames with --video frames")
        raise DataError(f"the clip {path} is empty; replace it")
    _check_decodes(path)
    return f"data:video/{_KINDS.get(path.suffix.lower(), 'mp4')};base64,{base64.b64encode(data).decode('ascii')}"


def check_decoder() -> None:
    """UnavailableError where clips cannot be taken apart."""
    try:
        import av  # noqa: F401
    except ImportError:
        raise UnavailableError(
            "its clips must be taken apart into frames, and the package av is missing: pip install 'zppo[eval]', or let a server that "
            "takes videos do it (--video file)"
        ) from None


def _check_decodes(path: Path) -> None:
    """DataError where the clip has no first frame: a server would refuse it. Without the package that decodes, nothing is checked."""
    try:
        import av
    except ImportError:
        return
    try:
        with av.open(str(path)) as container:
            next(container.decode(container.streams.video[0]))
    except Exception as error:  # decoders fail in many ways
        raise DataError(f"the clip {path} cannot be decoded ({one_line(error)}); replace it") from error


def _decoded(path: Path, clip: tuple[float, float] | None, frames: int, store: Path) -> list[ImageRef]:
    """Frames of a clip, evenly spaced in time, its first and its last among them. DataError where it cannot be decoded.

    Quizzes at the end of a clip (Video-MMMU) stand in its last frame alone; files often say that they last longer than their last frame.
    """
    check_decoder()
    check_file(path, DataError)
    import av

    wanted: list[bytes] = []
    last: Any = None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            length = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            times = _times(*(clip or (0.0, length or (container.duration or 0) / 1e6)), frames)
            taken: Any = None
            for frame in container.decode(stream):
                last, now = frame, frame.time
                if now is not None and now >= times[0]:
                    times = [time for time in times if time > now]
                    wanted.append(_picture(frame))
                    taken = frame
                if not times:
                    break
            if last is not None and last is not taken:  # the clip ends before the time of its last frame
                wanted.append(_picture(last))
    except Exception as error:  # decoders fail in many ways
        raise DataError(f"the clip {path} cannot be decoded ({one_line(error)}); replace it") from error
    if not wanted:
        raise DataError(f"the clip {path} has no frames; replace it")
    return [keep(data, store) for data in wanted]


def _times(start: float, end: float, count: int) -> list[float]:
    """So many moments, evenly spaced from start to end; the middle where one is wanted."""
    return [start + (end - start) * i / (count - 1) for i in range(count)] if count > 1 else [(start + end) / 2]


def _picture(frame: Any) -> bytes:
    """A frame of PyAV as a JPEG file."""
    out = io.BytesIO()
    frame.to_image().save(out, "JPEG", quality=95)
    return out.getvalue()
