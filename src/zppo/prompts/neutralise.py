"""Model text made harmless before it enters a prompt: it can neither leave its block nor form control tokens [zppo]."""

from __future__ import annotations

import re
import unicodedata
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

_UNSEEN = "\0"  # stands for any character that shows nothing
_UNSEEN_KINDS = frozenset({"Cc", "Cf", "Mn", "Me"})  # controls, formats (zero-width ones), marks that only change the letter before them
_UNSEEN_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # fillers, and braille without a dot
_LOOK_ALIKES = {
    "<": "\u02c2\u1438\u2039\u2329\u276e\u2770\u27e8\u3008\u300a\ufe64\uff1c",
    ">": "\u02c3\u1433\u203a\u232a\u276f\u2771\u27e9\u3009\u300b\ufe65\uff1e",
    "/": "\\\u2044\u2215\u2571\u29f8\uff0f\uff3c",
}


class _Plain(dict[int, str]):
    """What a character is taken for, one for one (`str.translate`): `<`, `>` and `/` for what looks like them, letters for their
    full-width and mathematical forms, a space for white space, `_UNSEEN` for what cannot be seen."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        plain = unicodedata.normalize("NFKC", char)
        if char.isspace():
            plain = " "
        elif unicodedata.category(char) in _UNSEEN_KINDS or char in _UNSEEN_LETTERS:
            plain = _UNSEEN
        elif len(plain) != 1:
            plain = char
        plain = next((known for known, alike in _LOOK_ALIKES.items() if char in alike), plain)
        self[code] = plain
        return plain


_PLAIN = _Plain()
_IN_A_WORD = re.compile(r"\w")


class Neutraliser:
    """Breaks whatever a tokenizer, a template or a reader could take for structure; every other text stays as it is.

    A tag is `<`, slashes or none, and the name of a tag as a word of its own, with white space and what cannot be seen (zero-width
    characters, controls) wherever one likes, the letters in any case; what stands behind the name (attributes, a slash) and whether a
    `>` ends it makes no difference. What only looks like `<`, `>`, `/` or a letter (full-width and mathematical forms, angle brackets of
    other scripts) counts as well. Its two brackets are replaced: `<think>` becomes `[think]`, `</ response foo>` `[/ response foo]`. In
    every special text a separator follows the first character: `<|im_end|>` becomes `< |im_end|>`. Right and wrong text is treated alike:
    the result depends on the text alone. One application suffices, whatever the text nests, and a second one changes nothing:

    - a tag left in the output would begin with a `<` that stood in the input, before the same name, and there it was replaced: no bracket
      that is put in is part of a tag's beginning or of a word;
    - the separator is a character that no special text holds, so a special text left in the output would have stood in
      one piece in the input, and there it would have been split;
    - a separator cannot complete a tag: between the parts of a tag white space changes nothing, and a name that a separator would end
      (a special text begins with the name's last letter) counts as ended.

    Time is linear in the text for a given set of special texts.
    """

    def __init__(self, special_texts: Iterable[str] = (), tags: Iterable[str] = TAGS) -> None:
        """Takes what is to be broken.

        Args:
            special_texts: what the tokenizers of student and teacher treat as one control token; white space alone is
                ignored (it carries no structure, and breaking it would change ordinary text).
            tags: names of the tags to break.
        """
        self._given = tuple(special_texts), tuple(tags)
        special_texts, tags = self._given
        texts = {text for text in special_texts if text.strip()}
        held = set("".join((*texts, *tags)))
        single = {text for text in texts if len(text) == 1}
        # A bracket that is put in must not complete a special text that begins with a letter: its separator could then end a name.
        taken = single.union(*(text for text in texts if _PLAIN[ord(text[0])].isalnum()))
        self._separator = next(c for c in chain(_SEPARATORS, map(chr, range(0x2190, 0x10FFFF))) if c not in held)
        self._brackets = next(pair for pair in chain(_BRACKETS, _more_brackets()) if not taken & set(pair))
        names = [_name(tag) for tag in tags]
        self._tag, self._names = _beginning(names), [re.compile(name, re.IGNORECASE) for name in names]
        self._single = _any_of(single)
        self._texts = frozenset(texts - single)
        self._lengths: dict[str, set[int]] = {}
        for text in self._texts:
            self._lengths.setdefault(text[0], set()).add(len(text))
        self._starts = _any_of(self._lengths)

    def with_tags(self, own_tags: Iterable[str]) -> Neutraliser:
        """One that breaks these tags too, of a user's templates: a letter, and then letters, digits, `_`, `.`, `:` and `-`."""
        special_texts, tags = self._given
        return Neutraliser(special_texts, (*tags, *own_tags))

    def __call__(self, text: str) -> str:
        """The harmless form of `text`."""
        if self._single is not None:
            text = self._single.sub(self._separator, text)
        if self._tag is not None:
            text = self._without_tags(text, self._tag)
        if self._starts is None:
            return text
        return self._starts.sub(lambda match: self._split(match, text), text)

    def _without_tags(self, text: str, tag: re.Pattern[str]) -> str:
        plain = text.translate(_PLAIN)
        parts, at = [], 0
        for match in tag.finditer(plain):
            names = (name.match(plain, match.start("name")) for name in self._names)
            if not any(name and self._ends(name.end(), plain, text) for name in names):
                continue  # <thinking>
            parts += [text[at : match.start()], self._brackets[0]]
            at = match.start() + 1
            if match["end"]:
                parts += [text[at : match.end() - 1], self._brackets[1]]
                at = match.end()
        return "".join([*parts, text[at:]]) if parts else text

    def _ends(self, at: int, plain: str, text: str) -> bool:
        """Whether a name that ends here is a word, or a separator would make it one."""
        return not _IN_A_WORD.match(plain, at) or self._begins_special(text, at - 1)

    def _begins_special(self, text: str, at: int) -> bool:
        return any(text[at : at + length] in self._texts for length in self._lengths.get(text[at], ()))

    def _split(self, match: re.Match[str], text: str) -> str:
        """The character at which a special text may begin, followed by the separator if one does."""
        return match[0] + self._separator if self._begins_special(text, match.start()) else match[0]


def _name(tag: str) -> str:
    """A pattern for the name of a tag in plain characters."""
    return f"{_UNSEEN}*+".join(map(re.escape, tag.translate(_PLAIN).replace(_UNSEEN, "")))


def _beginning(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for what may be a tag, up to the next `<` or the `>` that ends it; None without names. Its name begins at `name`."""
    either = "|".join(names)
    return re.compile(rf"<[ {_UNSEEN}/]*+(?P<name>(?={either}))[^<>]*+(?P<end>>)?", re.IGNORECASE) if either else None


def _more_brackets() -> Iterable[str]:
    return (chr(code) + chr(code + 1) for code in range(0x2190, 0x10FFFE, 2))


def _any_of(characters: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for one of the characters; None if there are none."""
    inner = "".join(map(re.escape, sorted(characters)))
    return re.compile(f"[{inner}]") if inner else None
