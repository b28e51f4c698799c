"""Model text made harmless before it enters a prompt: it can neither leave its block nor form control tokens [zppo]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain

TAGS = ("think", "summary", "candidate", "response", "hint", "question", "reference", "image")
"""The tags that prompts and completions use as structure; `<image>` is the place of an image (`core.types.IMAGE`)."""

IMAGE_TEXTS = (
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|image|>", "<|begin_of_image|>", "<|end_of_image|>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<fake_token_around_image>", "<global-img>", "<IMG_CONTEXT>"),
    *("<img>", "</img>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
"""What common model families take for images, to break where a model's own tokenizer is not known (a teacher on a server)."""

_SEPARATORS = (" ", "·", "_", "~", "^")
_BRACKETS = ("[]", "()", "{}", "«»")


class Neutraliser:
    """Breaks whatever a tokenizer or a template could take for structure; every other text stays as it is.

    Tags (opening, closing, any case, with inner white space) get other brackets: `<think>` becomes `[think]`. In every
    special text a separator follows the first character: `<|im_end|>` becomes `< |im_end|>`. Right and wrong text is
    treated alike: the result depends on the text alone. One application suffices, whatever the text nests, and a second
    one changes nothing:

    - a tag left in the output would hold none of the new brackets, so it stood in the input, where all were changed;
    - the separator is a character that no special text holds, so a special text left in the output would have stood in
      one piece in the input, and there it would have been split;
    - a separator cannot complete a tag: white space between the parts of a tag does not decide what is a tag.

    Time is linear in the text for a given set of special texts.
    """

    def __init__(self, special_texts: Iterable[str] = (), tags: Iterable[str] = TAGS, own_tags: Iterable[str] = ()) -> None:
        """Takes what is to be broken.

        Args:
            special_texts: what the tokenizers of student and teacher treat as one control token; white space alone is
                ignored (it carries no structure, and breaking it would change ordinary text).
            tags: names of the tags to break.
            own_tags: more of them, of a user's templates, which may have attributes.
        """
        self._given = tuple(special_texts), tuple(tags)
        special_texts, tags = self._given
        own = "|".join(map(re.escape, own_tags))
        own = rf"|(?:{own})(?:\s[^<>]*+)?" if own else ""
        texts = {text for text in special_texts if text.strip()}
        held = set("".join(texts))
        single = {text for text in texts if len(text) == 1}
        self._separator = next(c for c in chain(_SEPARATORS, map(chr, range(0x2190, 0x10FFFF))) if c not in held)
        self._brackets = next(pair for pair in _BRACKETS if not single & set(pair))
        self._tag = re.compile(rf"<(\s*+(?:/\s*+)?(?:{'|'.join(map(re.escape, tags))}{own})\s*+)>", re.IGNORECASE)
        self._single = _any_of(single)
        self._texts = frozenset(texts - single)
        self._lengths: dict[str, set[int]] = {}
        for text in self._texts:
            self._lengths.setdefault(text[0], set()).add(len(text))
        self._starts = _any_of(self._lengths)

    def with_tags(self, own_tags: Iterable[str]) -> Neutraliser:
        """One that breaks these tags too."""
        return Neutraliser(*self._given, own_tags=own_tags)

    def __call__(self, text: str) -> str:
        """The harmless form of `text`."""
        opening, closing = self._brackets[0], self._brackets[1]
        if self._single is not None:
            text = self._single.sub(self._separator, text)
        text = self._tag.sub(lambda match: opening + match[1] + closing, text)
        if self._starts is None:
            return text
        return self._starts.sub(lambda match: self._split(match, text), text)

    def _split(self, match: re.Match[str], text: str) -> str:
        """The character at which a special text may begin, followed by the separator if one does."""
        at, first = match.start(), match[0]
        found = any(text[at : at + length] in self._texts for length in self._lengths[first])
        return first + self._separator if found else first


def _any_of(characters: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for one of the characters; None if there are none."""
    inner = "".join(map(re.escape, sorted(characters)))
    return re.compile(f"[{inner}]") if inner else None
