"""What prompts begin with, found in their token ids: a tree whose nodes hold the keys and values of tokens once read.

    tree = PrefixTree(budget=16_384)
    leaves = [tree.insert(ids) for ids in prompt_ids]
    leaves[0].path()                                     # its nodes, from the first token to the last

Exemplars, a question, a rationale so far: what several prompts begin with is one node, read once and stored once. Nodes
outlive the call that made them while the budget has room, so that the next call finds them. RadixAttention, Zheng et
al. 2024 (arXiv:2312.07104), keeps such a tree for a server.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

LEAST_SHARED = 16  # tokens that prompts must have in common; to read fewer again is cheaper than one more node


class Node:
    """Tokens that follow those of `parent`, and what was computed of them.

    start: position of the first. states [layer, 2, head, token, feature]: keys and values; None where none are held.
    waiting: how many prompts that have not begun yet go through it.
    """

    def __init__(self, start: int, tokens: tuple[int, ...], parent: "Node | None"):
        self.start, self.tokens, self.parent = start, tokens, parent
        self.children: dict[tuple[int, ...], Node] = {}  # by their first LEAST_SHARED tokens
        self.states: Tensor | None = None
        self.waiting = 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> list["Node"]:
        """The nodes from the first token to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def find(self, ids: Sequence[int]) -> tuple["Node | None", int]:
        """The child that tokens agree with, for LEAST_SHARED or to its end; and for how many they do."""
        for length in range(min(LEAST_SHARED, len(ids)), 0, -1):
            if child := self.children.get(tuple(ids[:length])):
                pairs = zip(child.tokens, ids, strict=False)
                return child, next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(child.tokens), len(ids)))
        return None, 0

    def adopt(self, child: "Node") -> None:
        """Let prompts to come find a child. A short one is worth it only for what is below it."""
        child.parent = self
        if len(child.tokens) >= LEAST_SHARED or child.children:
            self.children.setdefault(child.tokens[:LEAST_SHARED], child)

    @property
    def found(self) -> bool:
        """Whether prompts to come find it."""
        return self.parent.children.get(self.tokens[:LEAST_SHARED]) is self


class PrefixTree:
    """Prompts by what they begin with. budget: tokens whose keys and values it holds for prompts to come."""

    def __init__(self, budget: int):
        self.budget, self.root = budget, Node(0, (), None)
        self._held: dict[Node, None] = {}  # the node longest unused first

    @property
    def tokens(self) -> int:
        """How many tokens' keys and values it holds."""
        return sum(len(node.tokens) for node in self._held)

    def insert(self, ids: Sequence[int]) -> Node:
        """The last node of a prompt. It is the prompt's own, as its last token is always read: the model says there
        what comes next."""
        node, ids = self.root, tuple(ids)
        while True:
            child, agree = node.find(ids[node.end : -1])
            if child is None:
                leaf = Node(node.end, ids[node.end :], node)
                node.adopt(leaf)
                return leaf
            node = child if agree == len(child.tokens) else self._divide(child, agree)

    def _divide(self, node: Node, length: int) -> Node:
        """Make a node of the first `length` tokens of a node, above it."""
        upper = Node(node.start, node.tokens[:length], node.parent)
        upper.waiting = node.waiting
        node.start, node.tokens = upper.end, node.tokens[length:]
        if node.states is not None:  # copies, as one may be let go and not the other
            upper.states, node.states = node.states[..., :length, :].clone(), node.states[..., length:, :].clone()
            self._held[upper] = None
        upper.parent.children[upper.tokens[:LEAST_SHARED]] = upper
        upper.adopt(node)
        return upper

    def hold(self, nodes: Iterable[Node], in_use: Iterable[Node] = ()) -> None:
        """These have been read or found, the last one is the one to keep longest. States beyond the budget go: first
        those that no prompt waits for, of these the ones longest unused. in_use: nodes that stay in any case."""
        for node in nodes:
            self._held.pop(node, None)
            self._held[node] = None
        in_use = set(in_use)
        for node in [node for node in self._held if not node.found and node not in in_use]:
            self._let_go(node)
        excess = self.tokens - self.budget
        for node in sorted((node for node in self._held if node not in in_use), key=lambda node: node.waiting > 0):
            if excess <= 0:
                break
            excess -= len(node.tokens)
            self._let_go(node)

    def _let_go(self, node: Node) -> None:
        """Its states go; and nodes that hold nothing, with nothing below them, are not found any more."""
        del self._held[node]
        node.states = None
        while node.parent is not None and node.states is None and not node.children and node.waiting <= 0:
            if node.found:
                del node.parent.children[node.tokens[:LEAST_SHARED]]
            node = node.parent
