"""Video: MMVU, MVBench, Video-MME with and without subtitles, Video-MMMU.

A clip is a file below the folder of the data, or a list of pictures in the column `frames`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zppo.core.types import IMAGE, Message
from zppo.evals.adapters.choice import LETTERS, ask_about, check_letter, checked_options, with_options
from zppo.evals.adapters.row import DatasetRow, strip_directives
from zppo.evals.clips.places import MVBENCH, VIDEOMMMU
from zppo.evals.item import Item, Kind, Media

_HUB_FILE = re.compile(r"https?://[^/]+/datasets/[^/]+/[^/]+/resolve/[^/]+/")
_TVQA, _TVQA_RATE = ("episodic_reasoning", 3.0)  # the task of MVBench whose clips are folders of pictures, and how many a second
_PICTURE = re.compile(r"<image[ _]?\d+>", re.IGNORECASE)
_NO_SUBTITLES = "This video has no subtitles."


def _video_item(
    row: DatasetRow,
    identity: str,
    messages: tuple[Message, ...],
    gold: str,
    kind: Kind,
    *fields: str,
    options: tuple[str, ...] = (),
    facts: Mapping[str, Any] | None = None,
    clip: tuple[float, float] | None = None,
    rate: float | None = None,
    where: str = "",
    places: tuple[str, ...] = (),
    images: tuple[Media, ...] = (),
) -> Item:
    """An item about the clip that is named in one of the fields, or by `where`."""
    frames, video = ((), row.path(fields[0], where)) if where and not row.has("frames") else row.video(*fields)
    if kind == "choice":
        check_letter(row, gold, options)
    return Item(
        identity,
        row.benchmark,
        messages,
        gold,
        kind,
        images=images,
        frames=frames,
        video=video,
        places=places if video else (),
        clip=clip,
        rate=rate,
        options=options,
        facts=facts or {},
    )


def mmvu(row: DatasetRow) -> tuple[Item, ...]:
    """MMVU: options under the letters of an object, or an open answer; the clip may be named by its address on the hub.

    Its own judge compares both kinds of answers.
    """
    facts = {"discipline": _discipline(row)}
    question = strip_directives(row.text("question"))
    where = "" if row.has("frames") else _HUB_FILE.sub("", row.text("video_path", "video"))
    options: tuple[str, ...] = ()
    if row.one_of("question_type", ("multiple-choice", "open-ended")) == "multiple-choice":
        choices = row.value("choices")
        if not isinstance(choices, Mapping):
            row.fail("choices", "is no object of letters and texts")
        texts = [DatasetRow(row.benchmark, row.number, choices).text(letter) for letter in LETTERS if choices.get(letter) not in (None, "")]
        options = checked_options(row, "choices", texts)
        question = with_options(question, options)
        check_letter(row, row.text("answer"), options)
    messages, gold = ask_about(row, question), row.text("answer")
    folder = Path(where).parent.name  # 0.mp4 is the name of a clip in each of them
    places = (f"videos/{folder}", folder) if folder else ()
    return (
        _video_item(row, row.text("id"), messages, gold, "judged", "video_path", options=options, facts=facts, where=where, places=places),
    )


def _discipline(row: DatasetRow) -> str:
    """What a question is about: its `metadata` says so, or the folder of its clip."""
    metadata = row.data.get("metadata")
    subject = metadata.get("subject") if isinstance(metadata, Mapping) else None
    named = re.search(r"videos/([^/]+)/[^/]+$", str(row.data.get("video_path") or row.data.get("video") or ""))
    return str(subject or (named[1].replace("_", " ") if named else ""))[:80]


def mvbench(row: DatasetRow) -> tuple[Item, ...]:
    """MVBench: the answer is the text of a candidate; some tasks are about a part of the clip, in seconds.

    A clip may be a folder of pictures, `fps` of them a second; TVQA's are so, 3 a second. `frames` are shown whole.
    """
    options = checked_options(row, "candidates", row.texts("candidates"))
    if row.text("answer") not in options:
        row.fail("answer", f"{row.text('answer')[:40]!r} is none of the candidates")
    gold = LETTERS[options.index(row.text("answer"))]
    clip = None
    if row.has("start") and row.has("end"):
        clip = (row.seconds("start"), row.seconds("end"))
        if clip[0] >= clip[1]:
            row.fail("end", f"is {clip[1]}, which is not behind start ({clip[0]})")
    rate = row.seconds("fps") if row.has("fps") else _TVQA_RATE if row.config == _TVQA else None
    text = with_options(strip_directives(row.text("question")), options)
    identity, messages, facts = f"{row.config or 'mvbench'}-{row.number}", ask_about(row, text), {"task": row.config}
    places = (*MVBENCH[row.config], row.config) if row.config in MVBENCH else ()
    return (
        _video_item(row, identity, messages, gold, "choice", "video", options=options, facts=facts, clip=clip, rate=rate, places=places),
    )


def videomme(row: DatasetRow) -> tuple[Item, ...]:
    """Video-MME without subtitles."""
    return (_videomme(row, ""),)


def videomme_subtitles(row: DatasetRow) -> tuple[Item, ...]:
    """Video-MME with subtitles: `subtitles` is the text of the clip's file of subtitles, which loading puts into the row."""
    text = subtitle_text(row.maybe("subtitles"))
    return (_videomme(row, f"The subtitles of the video:\n{text}\n\n" if text else f"{_NO_SUBTITLES}\n\n"),)


def _videomme(row: DatasetRow, before: str) -> Item:
    options = checked_options(row, "options", row.texts("options"))
    facts = {name: row.maybe(name) for name in ("duration", "domain", "sub_category", "task_type")}
    text = before + with_options(strip_directives(row.text("question")), options)
    where = "" if row.has("frames") else f"{row.text('videoID')}.mp4"
    gold = row.text("answer")
    return _video_item(
        row, row.text("question_id"), ask_about(row, text), gold, "choice", "videoID", options=options, facts=facts, where=where
    )


def subtitle_text(srt: str) -> str:
    """What is said in a file of subtitles (SRT), a line for each, without numbers, times and marks of fonts."""
    lines = (re.sub(r"<[^<>]*>", "", line).strip() for line in srt.replace("\ufeff", "").splitlines())
    spoken = [line for line in lines if line and not line.isdigit() and "-->" not in line]
    return "\n".join(line for i, line in enumerate(spoken) if i == 0 or line != spoken[i - 1])


def videommmu(row: DatasetRow) -> tuple[Item, ...]:
    """Video-MMMU: three configurations; those of the kind open want a number or a few words.

    A question of Adaptation is about a picture of its own, which is shown at its mark; copies of the set have it in the clip's last frame.
    """
    identity = row.text("id")
    facts = {"track": row.config, "subject": "_".join(identity.split("_")[1:-1])}
    field = VIDEOMMMU.get(facts["subject"], "")
    where = "" if row.has("frames") else f"{field}/{identity}.mp4".strip("/")
    text, gold = strip_directives(row.text("question")), row.text("answer")
    options = checked_options(row, "options", row.texts("options")) if row.has("options") else ()
    images = (row.image("image"),) if row.has("image") else ()
    text = _with_picture(with_options(text, options) if options else text, bool(images))
    name = f"{row.config}/{identity}" if row.config else identity
    kind: Kind = "choice" if options else "text"
    messages = ask_about(row, text, len(images))
    return (_video_item(row, name, messages, gold, kind, "id", options=options, facts=facts, where=where, images=images),)


def _with_picture(text: str, given: bool) -> str:
    """The text with its one picture at the first mark `<image 1>`; later marks, or all where there is none, are words."""
    marks = iter([IMAGE] if given else [])
    words = "(the image above)" if given else "(the image at the end of the video)"
    return _PICTURE.sub(lambda _: next(marks, words), text)
