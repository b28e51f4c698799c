"""How near a read page is to the written one: the mean of BLEU, METEOR, F-measure and edit similarity (OCRBench v2).

Needs the packages of `zppo[ocr]`: nltk, and jieba, which cuts Chinese into words.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache
from typing import Any

from zppo.errors import SettingsError
from zppo.evaluate.anls import similarity

_CHINESE = re.compile(r"[\u4e00-\u9fa5]")


class _NoSynonyms:
    """Stands where METEOR looks words up: nothing has to be downloaded, and scores do not depend on what was."""

    def synsets(self, word: str) -> list[Any]:
        return []


def page_score(gold: str, answer: str) -> float:
    """Mean of four similarities of two texts, 0 to 1; 0 for an empty one.

    BLEU-4 without smoothing and METEOR over words, the F-measure over their sets, and edit similarity over characters. METEOR matches
    words and stems; the benchmark's matches synonyms of WordNet too.

    Raises:
        SettingsError: nltk or jieba is not installed.
    """
    if not gold.strip() or not answer.strip():
        return 0.0
    chinese = bool(_CHINESE.search(gold) or _CHINESE.search(answer))
    want, got = _words(gold, chinese), _words(answer, chinese)
    shared = len(set(want) & set(got))
    f_measure = 2 * shared / (len(set(want)) + len(set(got)))
    return (_bleu(want, got) + _meteor(want, got) + f_measure + similarity(gold, answer)) / 4


def _words(text: str, chinese: bool) -> list[str]:
    return list(_jieba().lcut(text)) if chinese else text.split()


def _bleu(want: list[str], got: list[str]) -> float:
    bleu, _, _ = _nltk()
    with warnings.catch_warnings():  # no shared run of four words: as good as 0, and said for each text
        warnings.simplefilter("ignore")
        return float(bleu([want], got))


def _meteor(want: list[str], got: list[str]) -> float:
    _, meteor, stemmer = _nltk()
    return float(meteor([want], got, stemmer=stemmer, wordnet=_NoSynonyms()))


@lru_cache(maxsize=1)
def _nltk() -> tuple[Any, Any, Any]:
    try:
        from nltk.stem.porter import PorterStemmer
        from nltk.translate.bleu_score import sentence_bleu
        from nltk.translate.meteor_score import meteor_score
    except ImportError as error:
        raise _missing("nltk") from error
    return sentence_bleu, meteor_score, PorterStemmer()


@lru_cache(maxsize=1)
def _jieba() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its patterns have escapes that newer Pythons warn of
            import jieba
    except ImportError as error:
        raise _missing("jieba") from error
    jieba.setLogLevel(60)  # it announces its dictionary
    return jieba


def _missing(package: str) -> SettingsError:
    return SettingsError(
        f"OCRBench v2 is scored with {package}, which is not installed: pip install 'zppo[ocr]', or leave OCREN and OCRZH out"
    )
