"""Metrics of a text that a model reads from a picture: ANLS (InfographicVQA), and OCRBench v2's, one per task.

ANLS, Average Normalised Levenshtein Similarity: Biten et al., "Scene Text Visual Question Answering" (2019), as InfographicVQA uses it:
threshold 0.5, the best over all golds.

OCRBench v2 (Fu et al. 2025, appendix): written from what the benchmark publishes of its metrics; where the two differ, the docstring says
so. Pages are compared by the mean of BLEU, METEOR, F-measure and edit similarity, which takes the packages of `zppo[ocr]`: nltk, and
jieba, which cuts Chinese into words. Tables are compared as trees by TEDS (Zhong et al. 2020), documents by the likeness of their
outlines. The edit distance of ordered trees is Zhang and Shasha's (1989). Not the package apted: of trees whose costs are fractions it
does not always find the least one (1.0.3), and it is slower.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from html.parser import HTMLParser
from itertools import islice, product
from types import MappingProxyType
from typing import Any

from zppo.errors import SettingsError
from zppo.evals.adapters.row import written_value
from zppo.evals.item import Item

THRESHOLD = 0.5


def similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """1 - edit distance / length of the longer one; 1 for two empty ones."""
    # Of the extra `eval`, without which a dry run must work, and what is missing must be said.
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(first, second))


def anls(golds: Iterable[str], answer: str, threshold: float = THRESHOLD) -> float:
    """The best similarity to one of the golds, without regard to case and white space; 0 where it is not above the threshold."""
    best = max((similarity(_folded(gold), _folded(answer)) for gold in golds), default=0.0)
    return best if best > threshold else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


Box = tuple[int, int, int, int]

_MOST = 40_000  # characters of a response that are looked at
_CANVAS = 1000  # boxes are given in thousandths of the picture
_IOU = 0.5
_MOST_VARIANTS = 512  # of a dictionary in which some values have several spellings
_FENCE = re.compile(r"```(?:\w+)?\n(.*?)\n?```", re.DOTALL)
_PAIR = re.compile(r"[\"']?([\w\s]{1,80})[\"']?\s{0,5}[:=]\s{0,5}[\"']?([^\n,\"'{}]{1,200})[\"']?")
_NUMBERS = r"\s{0,5},\s{0,5}".join([r"(\d{1,4})"] * 4)
_BOX = re.compile(rf"[(\[]\s{{0,5}}{_NUMBERS}\s{{0,5}}[)\]]", re.ASCII)
_WORD_BOX = re.compile(rf"[(\[]\s{{0,5}}{_NUMBERS}\s{{0,5}},\s{{0,5}}([^\[\]()]{{1,200}}?)\s{{0,5}}[)\]]", re.ASCII)
_SHORT_WORDS = 5  # a gold with fewer words must be contained, one with more is compared by edit distance
_SHORT_LIST = 4  # the same in Chinese, which has no spaces: parts between commas
_JOINTS = ("", ".", ". ", ",", ", ", "、", ";", "; ", " ", "和")  # what may stand between letters of a handwritten choice


def ocr_score(item: Item, response: str) -> float:
    """The score of a response by the metric of `facts["task"]`; 0 for a task that the benchmark does not have."""
    metric = _METRICS.get(str(item.facts["task"]))
    return 0.0 if metric is None else float(min(1.0, max(0.0, metric(item, response[:_MOST]))))


def _line(text: str) -> str:
    return text.strip().replace("\n", " ")


def _contained(golds: Sequence[str], response: str, few: Callable[[str], bool]) -> float:
    """1 if a short gold is contained in the response; for a long one the similarity, from 0.5 on."""
    best = 0.0
    for gold in golds:
        if few(gold):
            best = max(best, float(gold in response))
        elif (near := similarity(gold, response)) >= 0.5:
            best = max(best, near)
    return best


def _few_words(text: str) -> bool:
    return len(text.split()) < _SHORT_WORDS


def _question(item: Item, response: str) -> float:
    """Questions in English: a letter, or text with or without regard to case."""
    how = item.facts.get("how", "")
    if how == "multiple choice":
        return _letter(item, response)
    if how == "case sensitive":
        return _contained([_line(gold) for gold in item.golds], _line(response), _few_words)
    return _contained([_line(gold.lower()) for gold in item.golds], _line(response.lower()), _few_words)


def _question_cn(item: Item, response: str) -> float:
    """Questions in Chinese: without spaces."""
    if item.facts.get("how", "") in ("multiple choice", "case sensitive"):
        return _question(item, response)
    golds = [_line(gold.lower()).replace(" ", "") for gold in item.golds]
    return _contained(golds, _line(response.lower()).replace(" ", ""), lambda text: len(text.split(",")) < _SHORT_LIST)


def _letter(item: Item, response: str) -> float:
    """The letters of the response are exactly the gold; of `B. text` only the letter counts (the benchmark: all letters of the text)."""
    match = re.fullmatch(r"\s*\(?([A-Za-z])\)?\s*(?:[.:,)].*)?", response, re.DOTALL)
    return float(item.golds[0] == (match[1].upper() if match else "".join(filter(str.isalpha, response))))


def _handwritten(item: Item, response: str) -> float:
    """Answers written by hand: prose as a page of text, letters of choices in any joint, the rest by containment."""
    gold = item.golds[0]
    if "简答" in str(item.facts.get("question", "")):
        return page_score(gold, response)
    return float(any(joint.join(gold) in response for joint in _JOINTS))


def _counting(item: Item, response: str) -> float:
    """Words are matched exactly; numbers of characters by how far off they are, from half right on."""
    if item.facts.get("how") != "regression":
        return float(any(_line(gold.lower()) in response.lower() for gold in item.golds))
    found = re.search(r"\d{1,9}", response, re.ASCII)
    best = 0.0
    for gold in item.golds:
        if found and (want := int(gold) if re.fullmatch(r"\d{1,9}", gold.strip(), re.ASCII) else 0):
            near = 1 - abs(int(found[0]) - want) / want
            best = max(best, near if near > 0.5 else 0.0)
    return best


def _formula(item: Item, response: str) -> float:
    """A gold formula is contained, spaces and text wrappers aside (the benchmark keeps the wrappers in English)."""
    bare = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text).replace("\n", "").replace(" ", "") for text in (response, *item.golds)]
    return float(any(gold in bare[0] for gold in bare[1:]))


def _table(item: Item, response: str) -> float:
    """A table in HTML, or in Markdown where the question asks for it."""
    gold = item.golds[0]
    asked = str(item.facts.get("question", "")).lower()
    if "markdown" in asked and "html" not in asked:
        return teds(_markdown_table(gold), _markdown_table(response))
    start = max(response.find("<body"), response.find("<table")) if "<body" not in response else response.find("<body")
    return 0.0 if start < 0 else teds(_as_table(gold), _as_table(response[start:]))


def _as_table(html: str) -> str:
    html = html.replace("\n", "")
    return html if "<table" in html else f"<table>{html}</table>"


def _markdown_table(text: str) -> str:
    fenced = _FENCE.search(text)
    lines = (fenced[1] if fenced else text).strip().split("\n")
    rows = [[cell.strip() or " " for cell in line.strip().split("|")[1:-1]] for line in (lines[:1] + lines[2:])]
    return "<table>" + "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows) + "</table>"


def _cell(text: str) -> str:
    return "<td>" + text.replace("&", "&amp;").replace("<", "&lt;") + "</td>"


def _chart(item: Item, response: str) -> float:
    """Data of a chart, a dictionary of dictionaries, compared as a table of keys and values."""
    gold, answer = _object(item.golds[0]), _object(response)
    return teds(_pairs_table(gold), _pairs_table(answer)) if gold and answer else 0.0


def _pairs_table(data: Mapping[object, object]) -> str:
    # A space between all characters of a value: the benchmark's own table has them, and they weigh in its similarity.
    rows = (f"<tr>{_cell(str(key))}{_cell(' '.join(str(value)))}</tr>" for key, value in data.items())
    return "<table>" + "".join(rows) + "</table>"


def _fields(item: Item, response: str) -> float:
    """Key information: the share of keys, of gold and response together, whose values agree; the best over spellings of the gold."""
    answer = {str(key).strip(): _plain(str(value)) for key, value in _object(response, loose=True).items()}
    best = 0.0
    for gold in islice(_variants(_object(item.golds[0])), _MOST_VARIANTS):
        keys = gold.keys() | answer.keys()
        right = sum(key in answer and answer[key] == _plain(gold[key]) for key in gold)
        best = max(best, right / len(keys) if keys else 0.0)
    return best


def _variants(data: Mapping[object, object]) -> Iterator[dict[str, str]]:
    """The dictionary with one of the values that each key may have."""
    values = [[str(v) for v in value] if isinstance(value, list | tuple) else [str(value)] for value in data.values()]
    for chosen in product(*values):
        yield dict(zip(map(str, data), chosen, strict=True))


def _plain(text: str) -> str:
    return text.lower().strip().replace("\n", " ").replace(" ", "")


def _placed(item: Item, response: str) -> float:
    """An answer and where it stands: half for each."""
    data = _object(response, loose=True)
    golds = [_line(gold.lower()) for gold in item.golds]
    content = _contained(golds, _line(str(data.get("answer", "")).lower()), _few_words) if "answer" in data else 0.0
    found = _BOX.search(str(data.get("bbox", "")))
    gold = item.facts.get("bbox", ())
    near = _iou(_box(found), tuple(gold)) if found and len(gold) == 4 else 0.0
    return (content + near) / 2


def _grounding(item: Item, response: str) -> float:
    """The last box of the response against the gold's four numbers."""
    boxes = [_box(match) for match in _BOX.finditer(response)]
    boxes = [box for box in boxes if max(box) <= _CANVAS]
    gold = [int(n) for n in re.findall(r"\d{1,5}", " ".join(item.golds), re.ASCII)]
    return _iou(boxes[-1], tuple(gold)) if boxes and len(gold) == 4 else 0.0


def _spotting(item: Item, response: str) -> float:
    """All words and where they stand: F1 of words whose box overlaps by more than half and whose text is the same, in any case.

    Words marked `###` do not count. Unlike the benchmark's script, marks around a word are not taken off before comparing.
    """
    golds = [
        (_around(box), text.strip().upper()) for box, text in zip(item.facts.get("boxes", ()), item.facts.get("content", ()), strict=True)
    ]
    found = {(_box(m), m[5].strip().strip("\"'").strip().upper()) for m in _WORD_BOX.finditer(response)}
    words = [w for w in sorted(found) if max(w[0]) <= _CANVAS and w[0][0] < w[0][2] and w[0][1] < w[0][3]]
    ignored = [box for box, text in golds if text == "###"]
    golds = [gold for gold in golds if gold[1] != "###"]
    words = [word for word in words if all(_iou(word[0], box) <= _IOU for box in ignored)][:_MOST_VARIANTS]
    right, left = 0, list(words)
    for box, text in golds:
        match = next((word for word in left if _iou(word[0], box) > _IOU), None)
        if match is not None:
            left.remove(match)
            right += match[1] == text
    return 2 * right / (len(golds) + len(words)) if golds and words else 0.0


def _box(match: re.Match[str]) -> Box:
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])


def _around(points: Sequence[int]) -> Box:
    """The upright box around a polygon x, y, x, y, ..."""
    return min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2])


def _iou(first: Sequence[int], second: Sequence[int]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    both = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - both
    return both / union if union > 0 else 0.0


def _object(text: str, loose: bool = False) -> Mapping[object, object]:
    """The dictionary in a text, in JSON or as Python writes it, in a fence or behind a name; loosely, also lines of `key: value`."""
    fences = _FENCE.findall(text)
    body = max(fences, key=len) if fences else text.strip()
    inside = body[body.find("{") : body.rfind("}") + 1] if "{" in body else body
    data = written_value(inside)
    if isinstance(data, Mapping):
        return data
    return {key.strip(): value.strip() for key, value in _PAIR.findall(body)} if loose else {}


_METRICS: Mapping[str, Callable[[Item, str], float]] = MappingProxyType(
    {
        task: metric
        for tasks, metric in (
            ("text recognition en, document classification en, cognition VQA en, diagram QA en, reasoning VQA en, science QA en, "
             "math QA en, APP agent en, ASCII art classification en", _question),
            ("cognition VQA cn, reasoning VQA cn", _question_cn),
            ("handwritten answer extraction cn", _handwritten),
            ("formula recognition en, formula recognition cn", _formula),
            ("text counting en", _counting),
            ("table parsing en, table parsing cn", _table),
            ("chart parsing en", _chart),
            ("document parsing en, document parsing cn", lambda item, response: outline_similarity(item.golds[0], response)),
            ("key information extraction en, key information mapping en, key information extraction cn", _fields),
            ("VQA with position en", _placed),
            ("full-page OCR en, full-page OCR cn, fine-grained text recognition en, text translation cn",
             lambda item, response: page_score(item.golds[0], response)),
            ("text grounding en", _grounding),
            ("text spotting en", _spotting),
        )
        for task in tasks.split(", ")
    }
)  # fmt: skip


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
    want, got = (list(_jieba().lcut(text)) if chinese else text.split() for text in (gold, answer))
    sentence_bleu, meteor_score, stemmer = _nltk()
    with warnings.catch_warnings():  # no shared run of four words: as good as 0, and said for each text
        warnings.simplefilter("ignore")
        bleu = float(sentence_bleu([want], got))
    meteor = float(meteor_score([want], got, stemmer=stemmer, wordnet=_NoSynonyms()))
    shared = len(set(want) & set(got))
    f_measure = 2 * shared / (len(set(want)) + len(set(got)))
    return (bleu + meteor + f_measure + similarity(gold, answer)) / 4


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


_CELL = "td"
_ROW_ENDS = frozenset({"tr", "thead", "tbody", "tfoot", "table"})
_VOID = frozenset("br hr img input meta link col wbr".split())
_MOST_DEPTH = 60
_MOST_NODES = 4000  # of one tree; a page of a document has some hundred cells
_TOO_MANY = 3  # times the nodes of the gold (and a few): its TEDS is below 1/3 anyway


@dataclass(slots=True)
class Node:
    """A node of an ordered tree.

    Attributes:
        label: what it is: a tag, or a line of a document.
        text: content of a table cell, a list of characters and inner tags.
        span: columns and rows that a cell covers.
    """

    label: str
    text: list[str] = field(default_factory=list)
    span: tuple[int, int] = (1, 1)
    children: list[Node] = field(default_factory=list)


Cost = Callable[[Node | None, Node | None], float]
"""What it costs to turn the first node into the second; None: to insert, to delete."""


class _Table(HTMLParser):
    """Reads the first table of a text as a tree; tags that are not closed are closed where the next one must begin."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.table: Node | None = None
        self.nodes = 0  # tags inside the table, those inside cells too
        self._open: list[Node] = []
        self._inner: list[str] = []  # open tags inside a cell
        self._done = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._done or (self.table is None and tag != "table") or self.nodes >= _MOST_NODES:
            return
        if self.table is None:
            self.table = Node("table")
            self._open = [self.table]
            return
        self.nodes += 1
        if tag in ("td", "th"):
            self._close({"td", "th"})
        elif tag in _ROW_ENDS:
            self._close({"td", "th", "tr"} if tag == "tr" else {"td", "th", "tr", "thead", "tbody", "tfoot"})
        elif self._open[-1].label == _CELL:
            self._open[-1].text.append(f"<{tag}>")
            if tag not in _VOID:
                self._inner.append(tag)
            return
        if len(self._open) >= _MOST_DEPTH:
            return
        given = dict(attrs)
        span = (_span(given.get("colspan")), _span(given.get("rowspan"))) if tag == _CELL else (1, 1)
        node = Node(tag, span=span)
        self._open[-1].children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if self._done or self.table is None:
            return
        if self._inner and self._inner[-1] == tag:
            self._inner.pop()
            self._open[-1].text.append(f"</{tag}>")
        elif tag == "table":
            self._done = True
        elif any(node.label == tag for node in self._open[1:]):
            while self._open[-1].label != tag:
                self._open.pop()
            self._open.pop()
            self._inner = []

    def handle_data(self, data: str) -> None:
        if not self._done and self._open and self._open[-1].label == _CELL:
            self._open[-1].text.extend(data)

    def _close(self, tags: set[str]) -> None:
        """Closes what is open of these, and what is open inside of it."""
        while len(self._open) > 1 and any(node.label in tags for node in self._open[1:]):
            self._open.pop()
        self._inner = []


def _span(text: str | None) -> int:
    return int(text) if text is not None and text.strip().isdecimal() and len(text) < 5 else 1


def _read(text: str) -> _Table:
    reader = _Table()
    reader.feed(text)
    reader.close()
    return reader


def teds(gold: str, answer: str) -> float:
    """Tree-edit-distance similarity of the first tables of two HTML texts, 0 to 1; 0 where there is none.

    Nodes differ wholly if their tags or spans do; cells by the edit distance of their content, relative to the longer one. [zppo] An
    answer with more than three times the gold's nodes counts 0: its similarity could not reach 1/3.
    """
    first, second = _read(gold), _read(answer)
    if first.table is None or second.table is None:
        return 0.0
    if second.nodes > _TOO_MANY * first.nodes + 10:
        return 0.0
    nodes = max(first.nodes, second.nodes, 1)
    return max(0.0, 1 - tree_distance(first.table, second.table, _cell_cost) / nodes)


def _cell_cost(first: Node | None, second: Node | None) -> float:
    if first is None or second is None or first.label != second.label or first.span != second.span:
        return 1.0
    if first.label != _CELL or not (first.text or second.text):
        return 0.0
    return 1 - similarity(first.text, second.text)


def tree_distance(first: Node, second: Node, cost: Cost) -> float:
    """The least cost of turning one ordered tree into another by changing, inserting and deleting nodes."""
    a, a_left, a_roots = _numbered(first)
    b, b_left, b_roots = _numbered(second)
    trees = [[0.0] * len(b) for _ in a]
    for i in a_roots:
        for j in b_roots:
            _forests(i, j, a, b, a_left, b_left, trees, cost)
    return trees[-1][-1]


def _forests(
    i: int, j: int, a: list[Node], b: list[Node], a_left: list[int], b_left: list[int], trees: list[list[float]], cost: Cost
) -> None:
    """Distances of all left parts of the two subtrees; those of whole subtrees go into `trees`."""
    top, left = a_left[i], b_left[j]
    above = [0.0]
    for y in range(left, j + 1):
        above.append(above[-1] + cost(None, b[y]))
    table = [above]
    for x in range(top, i + 1):
        row = [table[-1][0] + cost(a[x], None)]
        for y in range(left, j + 1):
            least = min(table[-1][y - left + 1] + cost(a[x], None), row[-1] + cost(None, b[y]))
            if a_left[x] == top and b_left[y] == left:
                least = min(least, table[-1][y - left] + cost(a[x], b[y]))
                trees[x][y] = least
            else:
                least = min(least, table[a_left[x] - top][b_left[y] - left] + trees[x][y])
            row.append(least)
        table.append(row)


def _numbered(root: Node) -> tuple[list[Node], list[int], list[int]]:
    """Nodes in postorder, for each the number of its leftmost leaf, and the numbers of the roots of key subtrees, ascending."""
    nodes: list[Node] = []
    left: list[int] = []

    def visit(node: Node) -> int:
        leaf = -1
        for child in node.children:
            found = visit(child)
            leaf = found if leaf < 0 else leaf
        nodes.append(node)
        left.append(leaf if leaf >= 0 else len(nodes) - 1)
        return left[-1]

    visit(root)
    return nodes, left, sorted({leaf: i for i, leaf in enumerate(left)}.values())


def outline_similarity(gold: str, answer: str) -> float:
    """Likeness of two documents in Markdown by their outlines, 0 to 1: lines under headings, whatever the lines say (OCRBench v2).

    A line matches every other one, an empty one none.
    """
    first, second = _outline(gold), _outline(answer)
    if second[1] > _TOO_MANY * first[1] + 10:
        return 0.0
    return max(0.0, 1 - tree_distance(first[0], second[0], _line_cost) / max(first[1], second[1]))


def _line_cost(first: Node | None, second: Node | None) -> float:
    if first is None or second is None:
        return 1.0
    return 0.0 if first.label.strip() and second.label.strip() else 1.0


def _outline(text: str) -> tuple[Node, int]:
    """The tree of a document, and how many nodes it has: a root, before all headings a node for what has none, then the headings."""
    root = Node("root", children=[Node("start")])
    lines = text.split("\n")[:_MOST_NODES]
    for line in lines:
        bare = line.replace("*", " ").replace("_", " ")
        if line.startswith("#"):
            root.children.append(Node(bare.replace("#", "")))
        else:
            root.children[-1].children.append(Node(bare))
    return root, len(lines) + 2
