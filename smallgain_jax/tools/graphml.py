"""GraphML as two tables, one of edges and one of nodes.

ElementTree parses; the rest is GraphML's own vocabulary. networkx is not in between: it drops the
defaults of attributes and nested graphs, turns undirected edges around, and refuses the vector
types of graph-tool.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from smallgain_jax.tools.columns import could_name, is_missing
from smallgain_jax.tools.tables import FileFormatError, Sheet, opened, stripped

_LABELS = ("name", "label")
_COLOURS = {"r", "g", "b"}

Element = ElementTree.Element
Attributes = dict[str, Any]


def read_graphml(path: Path) -> tuple[Sheet, Sheet]:
    """The edge table and the node table of a GraphML file.

    An attribute is a column of its name, with its declared default where an element has none or no
    value; nested graphs are read as part of the whole. Nodes are called by their attribute `name`
    or `label` where every node has one of its own (igraph keeps names there) and these can be ids,
    as fractions cannot; else by their id.

    Raises:
      FileFormatError: broken XML, several graphs, hyperedges, an undeclared key or node.
      OSError: a file that cannot be opened.
    """
    with opened(path) as file:
        try:
            root = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise FileFormatError(path, error.position[0], None, str(error)) from error
        except (LookupError, ValueError) as error:
            problem = f"the file cannot be read: {error}"
            raise FileFormatError(path, None, None, problem) from error
    graphs = [element for element in root if _tag(element) == "graph"]
    if _tag(root) != "graphml" or len(graphs) != 1:
        problem = f"the file holds {len(graphs)} graphs, expected one inside <graphml>"
        raise FileFormatError(path, None, None, problem)
    inside = list(graphs[0].iter())
    if any(_tag(element) == "hyperedge" for element in inside):
        raise FileFormatError(path, None, None, "a hyperedge joins more than two nodes: split it")
    notes = []
    if nested := sum(_tag(element) == "graph" for element in inside) - 1:
        what = "1 nested graph is" if nested == 1 else f"{nested} nested graphs are"
        notes.append(f"{path.name}: {what} read as part of the whole")
    keys = {key.get("id", ""): key for key in root if _tag(key) == "key"}
    nodes = [element for element in inside if _tag(element) == "node"]
    edges = [element for element in inside if _tag(element) == "edge"]
    node_data = [_attributes(path, keys, "node", node) for node in nodes]
    edge_data = [_attributes(path, keys, "edge", edge) for edge in edges]
    ids = [node.get("id", "") for node in nodes]
    names = _names(path, ids, node_data, notes)
    called = dict(zip(ids, names, strict=True))
    ends = {
        end: [_end(path, called, edge.get(end, "")) for edge in edges]
        for end in ("source", "target")
    }
    between = list(zip(ends["source"], ends["target"], strict=True))
    return (
        _sheet(
            path,
            ends,
            edge_data,
            [f"edge {source!r} - {target!r}" for source, target in between],
            notes,
        )._replace(empty="the graph is empty: it has no edge"),
        _sheet(path, {"node": names}, node_data, [f"node {name!r}" for name in names], []),
    )


def _tag(element: Element) -> str:
    # the namespace has had several addresses
    return str(element.tag).rpartition("}")[2]


def _name(key: Element) -> str:
    return key.get("attr.name") or key.get("yfiles.type") or key.get("id") or ""


def _attributes(path: Path, keys: dict[str, Element], of: str, element: Element) -> Attributes:
    found: Attributes = {}
    for key in keys.values():
        default = next((child for child in key if _tag(child) == "default"), None)
        if default is not None and key.get("for", "all") in (of, "all"):
            found[_name(key)] = default.text
    for child in element:
        if _tag(child) == "data":
            declared = keys.get(child.get("key", ""))
            if declared is None:
                problem = f"<data key={child.get('key')!r}> has no <key> that declares it"
                raise FileFormatError(path, None, None, problem)
            text = "".join(child.itertext())
            if not (_name(declared) in found and _no_value(declared, text.strip())):
                found[_name(declared)] = text
    return found


def _no_value(key: Element, text: str) -> bool:
    """Whether an element leaves an attribute to its default: text may well be called NA."""
    return not text or (key.get("attr.type", "string") != "string" and is_missing(text))


def _names(path: Path, ids: list[str], data: Sequence[Attributes], notes: list[str]) -> list[str]:
    if len(set(ids)) < len(ids):
        twice = next(k for k, name in enumerate(ids) if name in ids[:k])
        raise FileFormatError(path, None, None, f"node {ids[twice]!r} is declared twice")
    for attribute in _LABELS:
        names = stripped([own.get(attribute) for own in data])
        if ids and names != ids and None not in names and could_name(names):
            notes.append(f"{path.name}: nodes are called by their attribute {attribute!r}")
            for own in data:
                del own[attribute]
            return names
    return ids


def _end(path: Path, called: dict[str, str], node: str) -> str:
    if node not in called:
        raise FileFormatError(path, None, None, f"an edge ends at node {node!r}, never declared")
    return called[node]


def _sheet(
    path: Path,
    own: dict[str, list[str]],
    data: Sequence[Attributes],
    places: Sequence[str],
    notes: list[str],
) -> Sheet:
    names = list(dict.fromkeys(name for attributes in data for name in attributes))
    if {name.casefold() for name in names} >= _COLOURS and "node" in own:
        # drawing programs keep a node's colour as r, g and b
        notes = [*notes, f"{path.name}: r, g and b of the nodes are a colour, not energies"]
        names = [name for name in names if name.casefold() not in _COLOURS]
    # what the file calls as we call the ends is only an attribute there
    free = [name for name in names if name.casefold() not in own]
    if taken := [name for name in names if name not in free]:
        notes = [*notes, f"{path.name}: ignored attribute {', '.join(map(repr, taken))}"]
    columns = {name: stripped([a.get(name) for a in data]) for name in free}
    return Sheet(
        path,
        (*own, *columns),
        (*own.values(), *columns.values()),
        lambda row: (None, places[row]),
        notes=tuple(notes),
    )
