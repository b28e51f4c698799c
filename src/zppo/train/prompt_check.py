"""Whether a student's tokenizer knows the words of its questions."""

from __future__ import annotations

from collections.abc import Sequence

from zppo.core.types import Question
from zppo.engines.chat import Chat

SAMPLE = 200
MOST_UNKNOWN = 0.05


def unknown_tokens(chat: Chat, questions: Sequence[Question]) -> str:
    """A warning where more than 5% of the tokens of the first 200 questions are the unknown token (ours); "" where they are not.

    Such a tokenizer maps different questions to one prompt without a word; most have no unknown token at all.
    """
    unknown = chat.tokenizer.unk_token_id
    if unknown is None:
        return ""
    texts = ["\n\n".join(message.content for message in question.messages) for question in questions[:SAMPLE]]
    rows = chat.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    count, total = sum(row.count(unknown) for row in rows), sum(map(len, rows))
    if count <= MOST_UNKNOWN * total:
        return ""
    first = next(question.id for question, row in zip(questions, rows, strict=False) if unknown in row)
    return (
        f"warning: {count / total:.0%} of the tokens of the questions are {chat.tokenizer.unk_token!r}, which stands for any text that the "
        f"student's tokenizer does not know (question {first!r}, for one): different questions become the same prompt. "
        "Choose a student whose tokenizer knows your words"
    )
