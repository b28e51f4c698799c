"""Average Normalised Levenshtein Similarity: how near a text read from a document is to an accepted one.

Biten et al., "Scene Text Visual Question Answering" (2019), as InfographicVQA uses it: threshold 0.5, the best over all golds.

Tables as trees, and how near two trees are: TEDS (Zhong et al. 2020) and the outline's likeness of OCRBench v2.

The edit distance of ordered trees is Zhang and Shasha's (1989). Not the package apted: of trees whose costs are fractions it does not
always find the least one (1.0.3), and it is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

THRESHOLD = 0.5


def similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """1 - edit distance / length of the longer one; 1 for two empty ones."""
    # Of the extra `eval`, without which a dry run must work, and what is missing must be said.
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(first, second))


def anls(golds: Iterable[str], answer: str, threshold: float = THRESHOLD) -> float:
    """The best similarity to one of the golds, without regard to case and white space; 0 where it is not above the threshold."""
    best = max((similarity(_plain(gold), _plain(answer)) for gold in golds), default=0.0)
    return best if best > threshold else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


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
