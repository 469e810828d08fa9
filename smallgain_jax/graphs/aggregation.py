r"""Aggregates of nodes, and the sparse rows they are stored in: host side, NumPy only.

Everything here depends on who is coupled with whom and, for the choice of partners, on how
strongly; it runs once per structure. `graphs.multilevel` does the arithmetic on it inside `jit`.
"""

from typing import NamedTuple

import numpy as np

STRENGTH_PASSES = 4
"""Passes of matching by strength; those after it match at random.

A chain whose weights rise along it has one heaviest edge at a time, and would need as many passes
as it has edges; a random order needs about log2 of them.
"""


class Coupled(NamedTuple):
    """An undirected graph without duplicate edges; i < j."""

    i: np.ndarray  # [E] int
    j: np.ndarray  # [E] int
    strength: np.ndarray  # [E] float64, non-negative
    num_nodes: int


class Merged(NamedTuple):
    """A graph of aggregates, and where nodes and edges of the finer graph went."""

    graph: Coupled
    node: np.ndarray  # [n] aggregate of each node; their number where it is in none
    edge: np.ndarray  # [E] edge between aggregates; their number for edges inside one


WIDEST = 32
"""Each column is an operation in the program: a hub of thousands must not make thousands."""


class Packed(NamedTuple):
    """Rows of different length: a rectangle that most fit in, and a list of what sticks out."""

    columns: np.ndarray  # [W, n] int
    tail_row: np.ndarray  # [T] int, sorted
    tail: np.ndarray  # [T] int


def simple_graph(
    i: np.ndarray, j: np.ndarray, strength: np.ndarray, num_nodes: int
) -> tuple[Coupled, np.ndarray]:
    """The graph with parallel edges added up, and the edge [E] that each of those given is in."""
    low, high = np.minimum(i, j).astype(np.int64), np.maximum(i, j).astype(np.int64)
    key, edge = np.unique(low * num_nodes + high, return_inverse=True)
    total = np.bincount(edge, strength, key.size)
    return Coupled(*np.divmod(key, max(num_nodes, 1)), total, num_nodes), edge


def aggregate(graph: Coupled, rounds: int, rng: np.random.Generator) -> Merged:
    """Aggregates by rounds of matching, each of which at least halves every connected part.

    Nodes without a neighbour join no aggregate: a diagonal solves them.
    """
    node, edge = np.arange(graph.num_nodes), np.arange(graph.i.size)
    for k in range(rounds):
        merged = _pair(graph, rng, keep_isolated=k > 0)
        node = np.append(merged.node, merged.graph.num_nodes)[node]
        edge = np.append(merged.edge, merged.graph.i.size)[edge]
        graph = merged.graph
        if not graph.i.size:
            break
    return Merged(graph, node, edge)


def neighbor_rows(graph: Coupled) -> tuple[Packed, Packed]:
    """The neighbours of each node, and the edges to them, packed alike.

    The padding points at node 0 through edge number E, which has no coupling.
    """
    m = graph.i.size
    row = np.concatenate([graph.i, graph.j])
    entries = packed_rows(row, graph.num_nodes)
    other = np.concatenate([graph.j, graph.i, [0]])
    edge = np.concatenate([np.arange(m), np.arange(m), [m]])
    by_node, by_edge = (
        Packed(values[entries.columns], entries.tail_row, values[entries.tail])
        for values in (other, edge)
    )
    return by_node, by_edge


def packed_rows(row: np.ndarray, count: int) -> Packed:
    """Numbers of the entries of each row, padded by the number of entries.

    Args:
      row: row of each entry, int [N]; entries of row `count` are left out.
      count: number of rows.
    """
    order = np.argsort(row.astype(np.int32), kind="stable")
    ordered = row[order]
    degree = np.bincount(ordered, minlength=count)[:count]
    order, ordered = order[: degree.sum()], ordered[: degree.sum()]
    place = np.arange(order.size) - (np.cumsum(degree) - degree)[ordered]
    width = _width(degree)
    inside = place < width
    columns = np.full((width, count), row.size)
    columns[place[inside], ordered[inside]] = order[inside]
    return Packed(columns, ordered[~inside], order[~inside])


def _width(degree: np.ndarray) -> int:
    """Columns of the rectangle, 1 to `WIDEST`: an entry in the tail costs about five inside."""
    rows_with = np.bincount(degree, minlength=2)[::-1].cumsum()[::-1]  # of at least k entries
    tail = rows_with[::-1].cumsum()[::-1] - rows_with  # entries beyond k columns
    cost = np.arange(tail.size) * degree.size + 5 * tail
    return 1 + int(np.argmin(cost[1 : WIDEST + 1]))


def _pair(graph: Coupled, rng: np.random.Generator, *, keep_isolated: bool) -> Merged:
    n = graph.num_nodes
    partner = _matching(graph, rng)
    root = np.arange(n)
    matched = partner >= 0
    root[matched] = np.minimum(root, partner)[matched]
    # what found no partner has matched neighbours only: it joins the strongest of them
    _, favourite = _favourites(graph, _by_strength(graph, rng))
    alone = ~matched & (favourite >= 0)
    root[alone] = root[favourite[alone]]
    kept = np.ones(n, bool) if keep_isolated else favourite >= 0
    is_root = kept & (root == np.arange(n))
    count = int(is_root.sum())
    # numbered as their roots are: neighbours stay near each other in memory
    number = np.where(is_root, np.cumsum(is_root) - 1, count)
    node = np.where(kept, number[root], count)

    i, j = node[graph.i], node[graph.j]
    between = i != j
    coarse, inverse = simple_graph(i[between], j[between], graph.strength[between], count)
    edge = np.full(graph.i.size, coarse.i.size)
    edge[between] = inverse
    return Merged(coarse, node, edge)


def _by_strength(graph: Coupled, rng: np.random.Generator) -> np.ndarray:
    """Edges from the weakest to the strongest; those of one strength in random order."""
    shuffled = rng.permutation(graph.i.size)
    return shuffled[np.argsort(graph.strength[shuffled])]


def _favourites(graph: Coupled, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edge of each node, and its neighbour there, that comes last in `order`; -1 for none."""
    edge = np.full(graph.num_nodes, -1)
    # of repeated indices the last assignment stands
    edge[np.stack([graph.i[order], graph.j[order]], axis=1).ravel()] = np.repeat(order, 2)
    nodes = np.arange(graph.num_nodes)
    other = np.where(graph.i[edge] == nodes, graph.j[edge], graph.i[edge]) if order.size else edge
    return edge, np.where(edge >= 0, other, -1)


def _matching(graph: Coupled, rng: np.random.Generator) -> np.ndarray:
    """A maximal matching by handshakes: partner [n], -1 for nodes left alone.

    Every free node proposes to its strongest free neighbour; who propose to each other are matched.
    """
    partner = np.full(graph.num_nodes, -1)
    order = _by_strength(graph, rng)
    passes = 0
    while order.size:
        edge, _ = _favourites(graph, order)
        i, j = graph.i[order], graph.j[order]
        mutual = (edge[i] == order) & (edge[j] == order)
        partner[i[mutual]], partner[j[mutual]] = j[mutual], i[mutual]
        order = order[(partner[i] < 0) & (partner[j] < 0)]
        passes += 1
        if passes >= STRENGTH_PASSES:
            order = rng.permutation(order)
    return partner


__all__ = [
    "Coupled",
    "Merged",
    "Packed",
    "aggregate",
    "neighbor_rows",
    "packed_rows",
    "simple_graph",
]
