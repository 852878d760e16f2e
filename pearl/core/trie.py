"""The token trie: the possible continuations of a text. The drafter grows it, the target walks it. Start reading here.

Knows: the committed tokens, the *root* (the last of them), and below it the *nodes*, each a guess that follows its
parent. A node's identity is its path from the root, so two processes name the same node without agreeing on anything
first. Refuses to know: models, probabilities of whole vocabularies, ranks, clocks, how a guess was made.

Both sides hold a trie of their own, and verdicts reach the drafter late. So a guess may arrive for a parent that the
text has long passed. `Trie.grow` settles every such case by comparing tokens, because tokens have no races:

    text   a b c d(root)      a guess x below the node "b" is the claim "x follows b".
             ^                The text says c follows b: the claim x = c is true and committed, any other is dead.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DRAFT, FEATURE, SUFFIX, RECYCLED = "draft", "feature", "suffix", "recycled"
# Where a node came from: the kind of source that guessed it. Where two guess the same, the one listed first is
# believed, as it has read more of the text.
ORIGINS = (
    DRAFT,  # a smaller model
    FEATURE,  # a drafter that reads the target's hidden states
    SUFFIX,  # what followed such tokens before
    RECYCLED,  # what the target itself would have said after such a token
    "synthetic",  # made up, for measurements
)
FORGET_EVERY = 256  # tokens of a text: so often both sides forget the ids of nodes that it has passed
Proposal = tuple[tuple[int, float], ...]  # (token, q): the distribution that a guess was drawn from
OWN = ""  # in place of an origin: a token of the target's own, which nobody had guessed
ORIGIN_NUMBER = {origin: number for number, origin in enumerate(ORIGINS)}


@dataclass(slots=True, eq=False)
class Node:
    """A token at a position of the text, committed (at or above the root) or guessed (below it)."""

    token: int
    position: int  # index in the text: the first prompt token is 0
    children: dict[int, Node] = field(default_factory=dict)  # by token, in the order in which they were guessed
    proposal: Proposal = ()  # where `token` was sampled from; empty: proposed for certain
    logp: float = 0.0  # log of the chance, as its source sees it, that the walk goes here once it is at the parent
    origin: str = DRAFT  # of that source, one of `ORIGINS`
    dead: bool = False  # the text went another way

    def may_grow(self, root: int) -> bool:
        """Whether a guess may follow it once the root is at that position."""
        return self.position >= root and not self.dead


class Candidate(NamedTuple):
    """A node, and how likely the walk is to reach it."""

    node: Node
    parent: int  # the index of its parent in the same list, -1: the root
    logp: float  # of the whole path from the root
    depth: int  # below the root


class Trie:
    """The committed tokens and what may follow them."""

    def __init__(self, tokens: Sequence[int]):
        assert tokens, "a trie needs a root: at least one committed token"
        self.tokens = list(tokens)
        self.root = Node(self.tokens[-1], len(self.tokens) - 1)
        self.changes = 0  # how often a guess has come

    def grow(
        self,
        parent: Node,
        token: int,
        proposal: Proposal = (),
        logp: float = 0.0,
        origin: str = DRAFT,
    ) -> Node | None:
        """The node "`token` follows `parent`", or None where the text has already decided otherwise.

        A node that is there already keeps its place and its proposal; `logp` replaces what was thought of it before,
        unless that came from a source that knows more.
        """
        self.changes += 1
        if parent.dead:
            return None
        if parent.position < self.root.position:  # the text has moved on: is this what it says?
            position = parent.position + 1
            if self.tokens[position] != token:
                return None
            return self.root if position == self.root.position else Node(token, position)
        if parent.position == self.root.position:
            parent = self.root  # the same token at the same place, whatever object names it
        node = parent.children.get(token)
        if node is None:
            node = parent.children[token] = Node(token, parent.position + 1, {}, proposal, logp, origin)
        elif ORIGIN_NUMBER[origin] <= ORIGIN_NUMBER[node.origin]:
            node.logp, node.origin = logp, origin
        return node

    def commit(self, tokens: Sequence[int]) -> bool:
        """Appends `tokens` to the text and moves the root to the last of them.

        Returns whether the new root was already in the trie (a *hit*); the subtree below it is kept, all else dies.
        """
        hit = True
        for token in tokens:
            child = self.root.children.pop(token, None)
            _kill(self.root.children)
            hit = hit and child is not None
            self.root = child or Node(token, self.root.position + 1)
            self.tokens.append(token)
        return hit

    def pairs(self) -> Iterator[tuple[Node, Node]]:
        """Every node below the root, behind its parent, breadth first."""
        level = [self.root]
        for parent in level:
            for node in parent.children.values():
                level.append(node)
                yield parent, node

    def chain(self) -> list[Node]:
        """The nodes straight down from the root, the first guess of each node first."""
        nodes: list[Node] = []
        node = self.root
        while node.children:
            node = next(iter(node.children.values()))
            nodes.append(node)
        return nodes

    def best(
        self,
        limit: int,
        deepest: int = 1 << 30,
        logp: Callable[[Node, int], float] = lambda node, depth: node.logp,
        root: Node | None = None,
    ) -> list[Candidate]:
        """At most `limit` nodes below the root, or another node, likeliest first, none more than `deepest` below it.

        A node is never likelier than its parent, so parents come first: the set is closed under prefixes. `logp(node,
        depth)`: the log of the chance of a node, once the walk is at its parent.
        """
        found: list[Candidate] = []
        order = itertools.count()  # among equals the one that was seen first
        heap = [(0.0, next(order), Candidate(root or self.root, -1, 0.0, 0))]
        while heap and len(found) <= limit:
            _, _, at = heapq.heappop(heap)
            found.append(at)
            if at.depth < deepest:
                for child in at.node.children.values():
                    candidate = Candidate(child, len(found) - 2, at.logp + logp(child, at.depth + 1), at.depth + 1)
                    heapq.heappush(heap, (-candidate.logp, next(order), candidate))
        return found[1:]

    def leaves(self, deepest: int, origin: str | None = None) -> list[tuple[tuple[int, ...], Node, float]]:
        """The nodes that nothing follows yet, at most `deepest` below the root: (path, node, joint log-probability).
        With an `origin` those that nothing of that origin follows; it may have to say more than others did there.

        The path holds the tokens from below the root to the node. Likeliest first; the root itself if it is alone.
        """
        found = []
        stack: list[tuple[tuple[int, ...], Node, float]] = [((), self.root, 0.0)] if deepest >= 0 else []
        while stack:
            path, node, logp = stack.pop()
            below = node.children.values()
            if not below or (origin and all(child.origin != origin for child in below)):
                found.append((path, node, logp))
            if below and len(path) < deepest:
                stack += [((*path, child.token), child, logp + child.logp) for child in below]
        return sorted(found, key=lambda leaf: -leaf[2])


def path_numbers(nodes: Sequence[Candidate]) -> list[int]:
    """The path on which each of `nodes` lies (see `Trie.best`): 0, the likeliest chain, 1, 2, ... as they begin.

    A node goes on with its parent's path if it is the first child there; else a path begins with it. So no node has a
    number below its parent's.
    """
    numbers, ends = [], {-1: 0}  # the last node of each path so far, and its number
    for place, node in enumerate(nodes):
        number = ends.pop(node.parent, None)
        ends[place] = len(ends) if number is None else number
        numbers.append(ends[place])
    return numbers


def walk(root: Node, rows: dict[Node, int], pick: Callable[[Node], int]) -> list[int]:
    """The tokens that a pass commits: from the root follow the target's pick while that child was in the pass.

    `rows` are the nodes the pass has read, the root among them; `pick(node)` is the target's own next token after a
    node of the pass. Every pick on the way is committed; the last one, which leads out of the pass, is the
    *correction* of a wrong guess or the *bonus* after right ones. Never empty.
    """
    committed = []
    node: Node | None = root
    while node in rows:
        committed.append(pick(node))
        node = node.children.get(committed[-1])
    return committed


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix; by halves, as comparing slices is much faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _kill(children: dict[int, Node]) -> None:
    """A loop, as a chain may be deeper than Python's stack."""
    left = [*children.values()]
    while left:
        node = left.pop()
        node.dead = True
        left += node.children.values()
