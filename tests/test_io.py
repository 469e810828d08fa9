"""Graph files: round trips against NetworkX and SciPy, and every way a file can be malformed."""

import gc
import sys

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import polars as pl
import pytest
import scipy.io
import scipy.sparse

from smallgain_jax.graphs.build import from_edge_list, from_networkx, from_scipy, term_order
from smallgain_jax.graphs.local import Landau
from smallgain_jax.tools import tables
from smallgain_jax.tools.io import (
    FileFormatError,
    read_columns,
    read_graph,
    write_atomic,
    write_state,
)

RECORDS = [
    {"i": 0, "j": 1, "family": "gate_benefit", "weight": 0.5, "delta": -0.1},
    {"i": 1, "j": 2, "family": "quadratic", "weight": 1.0},
    {"i": 4, "j": 3, "family": "asymmetric_hinge", "weight": 2.0, "alpha_i": 0.5},
    {"i": 3, "j": 0, "family": "gate_benefit", "weight": 0.25, "delta": 0.2},
    {"i": 2, "j": 3, "family": "damped_gate_benefit", "weight": 1.0, "eta_power": 2.0},
]
COLUMNS = ("family", "weight", "alpha_i", "delta", "eta_power")


def write_table(path, columns):
    """A table of lists, None for an empty cell, in the format of the path's suffix."""
    if path.suffix == ".csv":
        rows = zip(*columns.values(), strict=True)
        lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
        path.write_text("\n".join([",".join(columns), *lines, ""]), encoding="utf-8")
    elif path.suffix == ".parquet":
        pl.DataFrame(columns).write_parquet(path)
    else:
        np.savez(path, **{k: as_array(cells) for k, cells in columns.items()})
    return path


def as_array(cells):
    text = any(isinstance(cell, str) for cell in cells)
    return np.array(cells) if text else np.array(cells, float if None in cells else None)


def csv_file(path, text):
    path.write_bytes(text.encode())
    return path


def edge_columns(names=None):
    ends = {"source": [r["i"] for r in RECORDS], "target": [r["j"] for r in RECORDS]}
    if names is not None:
        ends = {column: [names[k] for k in cells] for column, cells in ends.items()}
    return ends | {name: [r.get(name) for r in RECORDS] for name in COLUMNS}


def assert_same(graph, other):
    assert (graph.num_nodes, graph.keys) == (other.num_nodes, other.keys)
    assert jax.tree.structure(graph) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(graph), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture(params=[".csv", ".parquet", ".npz"])
def suffix(request):
    return request.param


class TestTables:
    def test_edges_by_number(self, tmp_path, suffix):
        read = read_graph(write_table(tmp_path / f"edges{suffix}", edge_columns()))
        assert_same(read.graph, from_edge_list(RECORDS, num_nodes=5))
        assert read.edges.tolist() == term_order(RECORDS).tolist()
        assert (read.x0, read.labels) == (None, ("0", "1", "2", "3", "4"))

    def test_names_are_numbered_as_they_appear(self, tmp_path, suffix):
        names = ["ann", "bob", "eve", "dan", "joe"]
        read = read_graph(str(write_table(tmp_path / f"edges{suffix}", edge_columns(names))))
        assert read.labels == ("ann", "bob", "eve", "joe", "dan")
        assert read.graph.num_nodes == 5
        assert [read.labels[k] for k in read.graph.i] == [
            names[RECORDS[row]["i"]] for row in read.edges
        ]

    def test_nodes_tell_order_energies_and_start(self, tmp_path, suffix):
        edges = write_table(tmp_path / f"e{suffix}", {"source": ["a", "b"], "target": ["c", "a"]})
        columns = {
            "node": ["b", "c", "lone", "a"],
            "a": [0.1, 0.2, 0.3, 0.4],
            "b": [1.0, None, 2.0, 3.0],
            "start": [0.5, 0.25, 0.125, 1.0],
        }
        read = read_graph(edges, write_table(tmp_path / f"n{suffix}", columns))
        local = Landau(a=np.array(columns["a"]), b=np.array([1.0, 0.0, 2.0, 3.0]))
        expected = from_edge_list([(3, 1), (0, 3)], local)
        assert_same(read.graph, expected)
        assert read.labels == tuple(columns["node"])
        np.testing.assert_array_equal(read.x0, columns["start"])

    def test_numbered_nodes_may_stand_in_any_order(self, tmp_path, suffix):
        edges = write_table(tmp_path / f"e{suffix}", {"source": [0, 1], "target": [2, 0]})
        nodes = {"node": [2, 0, 3, 1], "target": [0.2, 0.0, 0.3, 0.1], "start": [2.0, 0.0, 3, 1]}
        read = read_graph(edges, write_table(tmp_path / f"n{suffix}", nodes))
        assert read.labels == ("0", "1", "2", "3")
        np.testing.assert_array_equal(read.x0, [0.0, 1.0, 2.0, 3.0])
        np.testing.assert_allclose(read.graph.local[0].target, [0.0, 0.1, 0.2, 0.3])
        assert (read.graph.i.tolist(), read.graph.j.tolist()) == ([0, 1], [2, 0])

    def test_other_integers_are_names_in_a_node_table(self, tmp_path, suffix):
        big = 7_000_000_000
        edges = write_table(tmp_path / f"e{suffix}", {"source": [big, 5], "target": [5, 1]})
        read = read_graph(edges, write_table(tmp_path / f"n{suffix}", {"node": [1, 5, big]}))
        assert read.labels == ("1", "5", str(big))
        assert (read.graph.i.tolist(), read.graph.j.tolist()) == ([2, 1], [1, 0])
        assert (read.graph.local, read.x0) == ((), None)

    def test_numbers_with_gaps_are_names(self, tmp_path, suffix):
        edges = write_table(tmp_path / f"e{suffix}", {"source": [7, 3], "target": [3, 9]})
        read = read_graph(edges)
        assert read.labels == ("3", "7", "9")
        assert (read.graph.i.tolist(), read.graph.j.tolist()) == ([1, 0], [0, 2])
        (note,) = read.notes
        assert "node ids run from 3 to 9 and are kept as names; 4 numbers between" in note

    def test_numbers_of_any_size_cost_nothing(self, tmp_path, suffix):
        ends = {"source": [10_001, 10_002], "target": [10_002, 10**15]}
        read = read_graph(write_table(tmp_path / f"e{suffix}", ends))
        assert read.labels == ("10001", "10002", str(10**15))
        assert read.graph.num_nodes == 3

    def test_files_that_count_from_one_have_no_node_zero(self, tmp_path, suffix):
        ends = {"source": [1, 2, 3], "target": [2, 3, 1]}
        read = read_graph(write_table(tmp_path / f"e{suffix}", ends))
        assert read.labels == ("1", "2", "3")
        assert read.graph.i.tolist() == [0, 1, 2]

    def test_whole_fractions_are_numbers(self, tmp_path, suffix):
        ends = {"source": [0.0, 2.0], "target": [1.0, 0.0]}
        assert read_graph(write_table(tmp_path / f"e{suffix}", ends)).labels == ("0", "1", "2")

    def test_nodes_without_an_edge_are_reported(self, tmp_path, suffix):
        edges = write_table(tmp_path / f"e{suffix}", {"source": ["a"], "target": ["b"]})
        nodes = write_table(tmp_path / f"n{suffix}", {"node": ["a", "lone", "b", "far"]})
        assert read_graph(edges, nodes).notes == ("2 nodes have no edge: 'lone', 'far'",)

    def test_a_missing_weight_is_the_default(self, tmp_path, suffix):
        columns = {"source": [0, 1, 2], "target": [1, 2, 0], "weight": [0.5, None, 2.0]}
        read = read_graph(write_table(tmp_path / f"e{suffix}", columns))
        assert read.graph.edges[0].weight.tolist() == [0.5, 1.0, 2.0]
        assert read.notes == (
            f"e{suffix}: 1 of 3 cells of column 'weight' hold no value and mean the default, 1",
        )

    def test_a_missing_family_is_quadratic(self, tmp_path):
        columns = {"source": [0, 1], "target": [1, 2], "family": [None, "directed_hinge"]}
        read = read_graph(write_table(tmp_path / "e.parquet", columns))
        assert read.graph.keys == ("Quadratic", "DirectedHinge")

    def test_tables_of_different_formats(self, tmp_path):
        edges = write_table(tmp_path / "e.csv", {"source": [0], "target": [1]})
        nodes = write_table(tmp_path / "n.parquet", {"node": [0.0, 1.0], "a": [1, 2]})
        assert read_graph(edges, nodes).graph.local[0].a.tolist() == [1.0, 2.0]

    def test_byte_names(self, tmp_path):
        np.savez(tmp_path / "e.npz", source=np.array([b"a"]), target=np.array([b"b"]))
        assert read_graph(tmp_path / "e.npz").labels == ("a", "b")


class TestCsv:
    def test_what_spreadsheets_write(self, tmp_path):
        text = '\ufeffsource , target,weight\r\n"a, b", c ,2\r\n\r\n"x\ny",c,\r\n'
        read = read_graph(csv_file(tmp_path / "e.CSV", text))
        assert read.labels == ("a, b", "c", "x\ny")
        assert read.graph.edges[0].weight.tolist() == [2.0, 1.0]

    def test_empty_cells_mean_the_default(self, tmp_path):
        text = "source,target,family,beta_j\n0,1,,\n1,2,asymmetric_hinge,\n2,0,asymmetric_hinge,3\n"
        read = read_graph(csv_file(tmp_path / "e.csv", text))
        assert read.graph.keys == ("Quadratic", "AsymmetricHinge")
        assert read.graph.edges[1].beta_j.tolist() == [1.0, 3.0]

    def test_more_rows_than_a_block(self, tmp_path):
        rng = np.random.default_rng(0)
        source, hop = rng.integers(50, size=10_000), rng.integers(1, 50, size=10_000)
        columns = {"source": source.tolist(), "target": ((source + hop) % 50).tolist()}
        columns["weight"] = rng.random(10_000).tolist()
        path = write_table(tmp_path / "e.csv", columns)
        read = read_graph(path)
        assert read.graph.i.tolist() == columns["source"]
        np.testing.assert_allclose(read.graph.edges[0].weight, columns["weight"], rtol=1e-6)
        csv_file(path, path.read_text() + "1,2\n")
        with pytest.raises(FileFormatError) as caught:
            read_graph(path)
        assert (caught.value.line, caught.value.column) == (10_002, "weight")

    @pytest.mark.parametrize("separator", [",", "\t", " "])
    def test_parsers_agree_on_plain_rows(self, tmp_path, monkeypatch, separator):
        rng = np.random.default_rng(1)
        rows = zip(rng.integers(0, 90, 300), 90 + rng.integers(0, 9, 300), rng.random(300))
        lines = ["source target weight", *(f"{i} {j} {w}" for i, j, w in rows)]
        path = csv_file(tmp_path / "e.txt", "\n".join(lines).replace(" ", separator))
        fast, used = tables._fast_cells, []

        def spied(*parts):
            used.append(fast(*parts))
            return used[-1]

        monkeypatch.setattr(tables, "_fast_cells", spied)
        reads = [read_graph(path)]
        monkeypatch.setitem(sys.modules, "polars", None)
        reads.append(read_graph(path))
        assert all(cells is not None for cells in used)
        monkeypatch.setattr(tables, "_fast_cells", lambda *parts: None)
        reads.append(read_graph(path))
        for read in reads[1:]:
            assert_same(read.graph, reads[0].graph)
            assert (read.labels, read.notes) == (reads[0].labels, reads[0].notes)

    @pytest.mark.parametrize(
        ("text", "line", "column", "message"),
        [
            ("", None, None, "empty"),
            ("\n\n", None, None, "empty"),
            ("source,target\n", None, None, "empty"),
            ("source,weight\n0,1\n", 1, "target", "missing"),
            ("one,two\n0,1\n", 1, "source", "missing: there are 'one', 'two', separated by ','"),
            ("source;goal\n0;1\n", 1, "target", "missing: there are 'source', 'goal'.*by ';'"),
            ("source,target,wieght\n0,1,2\n", 1, "wieght", "if it is meant to be 'weight'"),
            ("source,target,source\n0,1,2\n", 1, "source", "twice"),
            ("source\ttarget\tw\n0\t1\n", 2, "w", "2 cells, the header 3 .separated by tabs"),
            ("source\ttarget\tw\n0\t1\t1,234\n", 2, "w", "'1,234' may be a fraction or"),
            ("source,target,w\n0,1,1_000\n", 2, "w", "'1_000' is not a number"),
            ("source;target;w\n0;1;1.234,5\n", 2, "w", "'1.234,5' is not a number"),
            ("source,target\n0,1\n1,2,3\n", 3, None, "3 cells, the header 2"),
            ("source,target,weight\n0,1,1\n\n1,2\n", 4, "weight", "2 cells, the header 3"),
            ("source,target,weight\n0,1,1\n1,2,x\n", 3, "weight", "'x' is not a number"),
            ("source,target,weight\n0,1,1\n0,1,1e999\n", 3, "weight", "1e999 must be finite"),
            ("source,target,weight\n0,1,-0.5\n", 2, "weight", "-0.5 must be at least 0"),
            ('source,target,weight\n"a\nb",1,1\n\n0,1,-2\n', 5, "weight", "at least 0"),
            ("source,target,family\n0,1,\n0,1,spring\n", 3, "family", "'spring' is unknown"),
            ("source,target,delta\n0,1,\n0,1,2\n", 3, "delta", "quadratic has no such parameter"),
            (
                "source,target,family,eta_power\n0,1,damped_gate_benefit,0.5\n",
                2,
                "eta_power",
                "0.5 must be at least 1",
            ),
            ("source,target\n0,1\n2,2\n", 3, "target", "'2' is also the source"),
            ("source,target\na,b\nb,b\n", 3, "target", "'b' is also the source"),
            (
                "source,target\n0,1\n1,-2\n",
                3,
                "target",
                "-2 is not a node number: .* stand for no node",
            ),
            (
                'source,target\n"a,b\nc,d\n',
                2,
                None,
                "a quote is opened in this row and never closed",
            ),
            ('source,target\na,"b\n\nc,d\n', 2, None, "never closed"),
            ("a b {'weight': 0.5}\nb c\n", 2, None, "expected two ends and a dictionary"),
            ("a b {'weight': 0.5}\na b c {}\n", 2, None, "expected two ends and a dictionary"),
            ("a b {'w': f(1)}\n", 1, None, "is not a dictionary of numbers and text"),
            ("a b {1, 2}\n", 1, None, "is not a dictionary of numbers and text"),
            ("source,target,family\n0,1,springs\n", 2, "family", "unknown: choose from quadratic"),
            ("source,target,family\n0,1,directed\n", 2, "family", "did you mean 'directed_hinge'"),
            ("source,target\n0,1\n1.5,2\n", 3, "source", "1.5 is neither an integer nor text"),
            ("source,target\n0,1\nnan,2\n\n2,\n", 5, "target", "the cell is empty"),
            ("source,target\n0,1\n,1\n", 3, "source", "empty"),
        ],
    )
    def test_names_line_and_column(self, tmp_path, text, line, column, message):
        path = csv_file(tmp_path / "edges.csv", text)
        with pytest.raises(FileFormatError, match=message) as caught:
            read_graph(path)
        error = caught.value
        assert (error.path, error.line, error.column) == (path, line, column)
        assert str(error).startswith(str(path))
        assert line is None or f"line {line}" in str(error)
        assert gc.isenabled()

    @pytest.mark.parametrize(
        ("text", "line", "column", "message"),
        [
            ("node,a\n0,1\n1,1\n0,2\n2,1\n", 4, "node", "'0' is already on line 2"),
            ("node,a\n0,1\n1,x\n2,1\n", 3, "a", "not a number"),
            ("node,b\n0,1\n1,-1\n2,1\n", 3, "b", "at least 0"),
            ("node,a\n0,1\n-1,1\n2,1\n", 3, "node", "-1 is not a node number"),
            ("node,start\n0,1\n1,inf\n2,1\n", 3, "start", "finite"),
            ("a,b\n0,1\n", 1, "node", "missing"),
            ("node,strat\n0,1\n", 1, "strat", "if it is meant to be 'start'"),
            ("0,1\n1,2\n", 1, None, "no header: its first line is 0, 1"),
            ("node,a\n", None, None, "empty"),
        ],
    )
    def test_names_line_and_column_of_the_node_table(self, tmp_path, text, line, column, message):
        edges = csv_file(tmp_path / "edges.csv", "source,target\n0,1\n1,2\n")
        nodes = csv_file(tmp_path / "nodes.csv", text)
        with pytest.raises(FileFormatError, match=message) as caught:
            read_graph(edges, nodes)
        error = caught.value
        assert (error.path, error.line, error.column) == (nodes, line, column)

    def test_a_node_that_the_table_lacks(self, tmp_path):
        edges = csv_file(tmp_path / "edges.csv", "source,target\na,b\nb,c\n")
        nodes = csv_file(tmp_path / "nodes.csv", "node\na\nb\n")
        with pytest.raises(FileFormatError, match="'c' is not in the node table") as caught:
            read_graph(edges, nodes)
        error = caught.value
        assert (error.path, error.line, error.column) == (edges, 3, "target")
        nodes = csv_file(tmp_path / "nodes.csv", "id,Label\n1,a\n2,b\n3,c\n")
        with pytest.raises(FileFormatError, match="nodes are called by its column 'id'"):
            read_graph(edges, nodes)

    def test_not_text(self, tmp_path):
        path = tmp_path / "e.csv"
        path.write_bytes(b"source,target\n\xff\xfe,1\n")
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_graph(path)

    def test_a_cell_beyond_the_csv_limit(self, tmp_path):
        path = csv_file(tmp_path / "e.csv", f'source,target\n0,1\n"{"a" * 200_000}",1\n')
        with pytest.raises(FileFormatError, match="field larger") as caught:
            read_graph(path)
        assert caught.value.line == 3


NUMBERED = [(3, 2, 0.5), (2, 1, 2.0), (1, 3, 1.25)]
EDGES = [("ann", "bob", 0.5), ("bob", "eve", 2.0), ("eve", "ann", 1.25)]


def assert_edges(read, edges=EDGES):
    """What was read are these edges, in this order, of a quadratic graph."""
    assert read.graph.keys == ("Quadratic",)
    found = zip(read.graph.i.tolist(), read.graph.j.tolist(), strict=True)
    weight = read.graph.edges[0].weight.tolist()
    told = [(read.labels[i], read.labels[j], w) for (i, j), w in zip(found, weight, strict=True)]
    assert told == list(edges)


class TestFilesAsPeopleHaveThem:
    """Text that other programs write, and that is read without a doubt."""

    @pytest.mark.parametrize("engine", ["polars", "numpy", "careful"])
    @pytest.mark.parametrize(
        ("name", "text", "notes"),
        [
            ("from-to.csv", "from,to,w\nann,bob,0.5\nbob,eve,2\neve,ann,1.25\n", 0),
            (
                "gephi.csv",
                "Source,Target,Type,Id,Label,Weight\nann,bob,Directed,0,,0.5\n"
                "bob,eve,Directed,1,,2.0\neve,ann,Directed,2,,1.25\n",
                1,
            ),
            (
                "german.csv",
                "Source;Target;Weight\r\nann;bob;0,5\r\nbob;eve;2\r\neve;ann;1,25\r\n",
                0,
            ),
            ("tabs.tsv", "source\ttarget\tweight\nann\tbob\t0.5\nbob\teve\t2\neve\tann\t1.25\n", 0),
            (
                "bars.txt",
                "src | dst | weight\nann | bob | 0.5\nbob | eve | 2\neve | ann | 1.25\n",
                0,
            ),
            ("spaces.edges", "u   v weight\nann bob  0.5\nbob   eve 2 \n eve ann 1.25\n", 0),
            (
                "pandas.csv",
                ",source,target,weight\n0,ann,bob,0.5\n1,bob,eve,2.0\n2,eve,ann,1.25\n",
                1,
            ),
            (
                "r.csv",
                '"","source","target","weight"\n"1","ann","bob",0.5\n"2","bob","eve",2\n'
                '"3","eve","ann",1.25\n',
                1,
            ),
            (
                "r-table.txt",
                '"source" "target" "weight"\n"1" "ann" "bob" 0.5\n"2" "bob" "eve" 2\n'
                '"3" "eve" "ann" 1.25\n',
                1,
            ),
            ("trailing.csv", "source,target,weight,\nann,bob,0.5,\nbob,eve,2,\neve,ann,1.25,\n", 0),
            ("trailing2.csv", "source,target,weight\nann,bob,0.5,\nbob,eve,2,\neve,ann,1.25,\n", 0),
            (
                "comments.csv",
                "# made by hand\n% twice\n\nsource,target,weight\nann,bob,0.5\n\n"
                "#ann,eve,7\nbob,eve,2\neve,ann,1.25\n",
                1,
            ),
            ("savetxt.csv", "# source,target,weight\nann,bob,0.5\nbob,eve,2\neve,ann,1.25\n", 0),
            ("no-end.csv", "source,target,weight\nann,bob,0.5\nbob,eve,2\neve,ann,1.25", 0),
            ("mac.csv", "source,target,weight\rann,bob,0.5\rbob,eve,2\reve,ann,1.25\r", 0),
            (
                "bom.csv",
                "\ufeffSOURCE,TARGET,WEIGHT\r\nann,bob,.5\r\nbob,eve,2e0\r\neve,ann,1.25\r\n",
                0,
            ),
            (
                "quoted.csv",
                '"source", "target", "weight"\n"ann","bob","0.5"\n"bob","eve","2"\n'
                '"eve","ann","1.25"\n',
                0,
            ),
            (
                "blanks.csv",
                "\n\nsource,target,weight\n\nann,bob,0.5\n \nbob,eve,2\neve,ann,1.25\n\n",
                0,
            ),
            ("excel.csv", "sep=;\nsource;target;weight\nann;bob;0,5\nbob;eve;2\neve;ann;1,25\n", 0),
            (
                "excel-tab.csv",
                "\ufeffSep=\t\r\nsource\ttarget\tw\r\nann\tbob\t0.5\r\nbob\teve\t2\r\neve\tann\t1.25\r\n",
                0,
            ),
            (
                "excel-blank.csv",
                "source,target,weight\r\nann,bob,0.5\r\nbob,eve,2\r\neve,ann,1.25\r\n,,\r\n,,\r\n",
                0,
            ),
            (
                "blank-first.csv",
                ",,\nsource,target,weight\n,,\nann,bob,0.5\n , ,\t\nbob,eve,2\neve,ann,1.25\n",
                0,
            ),
            (
                "comment-first.csv",
                "source,target,weight\n#ann,eve,5\nann,bob,0.5\n //ann,eve,5\nbob,eve,2\n"
                "\t% ann,eve,5\neve,ann,1.25\n",
                1,
            ),
            ("melted.csv", "i,j,value\nann,bob,0.5\nbob,eve,2\neve,ann,1.25\n", 0),
            (
                "pair.csv",
                "from,to,weight,source\nann,bob,.5,web\nbob,eve,2,web\neve,ann,1.25,x\n",
                1,
            ),
            ("no-names.edgelist", "ann bob 0.5\nbob eve 2\neve ann 1.25\n", 1),
            ("no-names.edges", "#G\n\nann\tbob\t0.5\nbob\teve\t2\neve\tann\t1.25\n", 1),
            (
                "networkx.edgelist",
                "ann bob {'weight': 0.5}\nbob eve {'weight': 2}\neve ann {'weight': 1.25}\n",
                0,
            ),
            (
                "networkx.txt",
                "# made\nann\tbob\t{'weight': np.float64(0.5), 'since': 'a, {b}'}\n"
                "bob\teve\t{'weight': 2}\n % no edge\neve\tann\t{'weight': 1.25}\n",
                1,
            ),
            (
                "id-weight.csv",
                "id,Target Id,source-id,WEIGHT\n9,bob,ann,0.5\n8,eve,bob,2\n7,ann,eve,1.25\n",
                1,
            ),
        ],
    )
    def test_text(self, tmp_path, monkeypatch, engine, name, text, notes):
        if engine == "numpy":
            monkeypatch.setitem(sys.modules, "polars", None)
        elif engine == "careful":
            monkeypatch.setattr(tables, "_fast_cells", lambda *parts: None)
        read = read_graph(csv_file(tmp_path / name, text))
        assert_edges(read)
        assert len(read.notes) == notes, read.notes

    @pytest.mark.parametrize("engine", ["polars", "numpy", "careful"])
    @pytest.mark.parametrize(
        ("text", "labels"),
        [
            ("0,1,0.5\n1,2,2\n2,0,1.25\n", "012"),
            ("# FromNodeId\tToNodeId\tw\n1\t2\t0.5\n2\t3\t2\n3\t1\t1.25\n", "123"),
            ("1 2 0.5\n2 3 2\n3 1 1.25\n", "123"),
            ("# a simple graph\n1 2 0.5\n2 3 2\n3 1 1.25\n", "123"),
            ("1 2 {'weight': 0.5}\n2 3 {'weight': 2}\n3 1 {'weight': 1.25}\n", "123"),
            ("source,target,weight\n2.0,0.0,0.5\n0.0,1.0,2\n1.0,2.0,1.25\n", "201"),
            ("source;target;weight\n2;0;0,5\n0;1;2\n1;2;1,25\n", "201"),
            ("source;target;weight\n10;30;0.5\n30;20;2\n20;10;1.25\n", ("10", "30", "20")),
            (
                f"source,target,weight\n{2**70},7,0.5\n7,1,2\n1,{2**70},1.25\n",
                (f"{2**70}", "7", "1"),
            ),
            ("source,target,weight\n1e5,7e2,0.5\n7e2,1e2,2\n1e2,1e5,1.25\n", ("1e5", "7e2", "1e2")),
            ("source,target,weight\n007,7,0.5\n7,70,2\n70,007,1.25\n", ("007", "7", "70")),
            # one spelling of each id, whatever stands beside it
            ("source,target,weight\n1.0,2.0,0.5\n2.0,x,2\nx,1,1.25\n", "12x"),
            ("source,target,weight\n1,-0,0.5\n-0.0,x,2\nx,1.,1.25\n", "10x"),
            ("source,target,weight\n1,0,0.5\n\n-0,2,2\n2,1e+0,1.25\n", "102"),
            (
                "".join(f"{i:.18e} {j:.18e} {w:.18e}\n" for i, j, w in NUMBERED),
                "321",
            ),
            (
                "source,target,weight\n\n"
                + "".join(f"{i:.18e},{j:.18e},{w}\n" for i, j, w in NUMBERED),
                "321",
            ),
        ],
    )
    def test_numbers(self, tmp_path, monkeypatch, engine, text, labels):
        if engine == "numpy":
            monkeypatch.setitem(sys.modules, "polars", None)
        elif engine == "careful":
            monkeypatch.setattr(tables, "_fast_cells", lambda *parts: None)
        read = read_graph(csv_file(tmp_path / "e.txt", text))
        a, b, c = labels
        assert_edges(read, [(a, b, 0.5), (b, c, 2.0), (c, a, 1.25)])

    def test_a_family_may_be_spelled_as_its_class(self, tmp_path):
        text = "source,target,family\na,b,DirectedHinge\nb,c,directed hinge\n"
        read = read_graph(csv_file(tmp_path / "e.csv", text))
        assert read.graph.keys == ("DirectedHinge",)

    def test_what_networkx_writes(self, tmp_path):
        network = nx.Graph([("ann", "bob", {"weight": 0.5}), ("bob", "eve", {})])
        for name, separator in (("a.edgelist", " "), ("b.txt", ","), ("c.edges", "\t")):
            nx.write_edgelist(network, tmp_path / name, delimiter=separator)
            assert_edges(read_graph(tmp_path / name), [("ann", "bob", 0.5), ("bob", "eve", 1.0)])
        nx.write_weighted_edgelist(
            nx.Graph([("ann", "bob", {"weight": 0.5})]), tmp_path / "w.edges"
        )
        assert_edges(read_graph(tmp_path / "w.edges"), [("ann", "bob", 0.5)])
        values = [np.nan, np.float64(np.nan), np.True_, None, np.float32(0.5), 2]
        network = nx.Graph([(f"n{k}", "z", {"weight": value}) for k, value in enumerate(values)])
        nx.write_edgelist(network, tmp_path / "v.edgelist")
        read = read_graph(tmp_path / "v.edgelist")
        assert read.graph.edges[0].weight.tolist() == [1.0, 1.0, 1.0, 1.0, 0.5, 2.0]
        assert "3 of 6 cells of column 'weight' hold no value" in read.notes[0]
        nx.write_edgelist(nx.Graph([("a", "b", {"weight": np.inf})]), tmp_path / "i.edgelist")
        with pytest.raises(FileFormatError, match="column 'weight': inf must be finite"):
            read_graph(tmp_path / "i.edgelist")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                "0123",
                r"line \d+: the row has \d cells?, .*: if each line holds a node and its neigh",
            ),
            ("abcd", "there are 'a b c' alone, as white space parts cells only where all lines"),
        ],
    )
    def test_lists_of_neighbours_are_told_from_edges(self, tmp_path, names, message):
        a, b, c, d = names
        nx.write_adjlist(nx.Graph([(a, b), (a, c), (b, d)]), tmp_path / "e.txt")
        with pytest.raises(FileFormatError, match=message):
            read_graph(tmp_path / "e.txt")

    def test_an_inch_is_no_quote(self, tmp_path):
        text = 'source,target,note\nann,bob,5" pipe\nbob,eve,x\n'
        assert read_graph(csv_file(tmp_path / "e.csv", text)).labels == ("ann", "bob", "eve")

    def test_names_with_spaces_umlauts_and_quotes(self, tmp_path):
        text = 'source;target\n Jürg Groß ; "O\'Neil; ""Bo"""\nŁukasz;"#5"\n'
        read = read_graph(csv_file(tmp_path / "e.csv", text))
        assert read.labels == ("Jürg Groß", 'O\'Neil; "Bo"', "Łukasz", "#5")
        utf16 = tmp_path / "f.csv"
        utf16.write_bytes(text.encode("utf-16"))
        assert read_graph(utf16).labels == read.labels

    @pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
    @pytest.mark.parametrize("kind", [".csv", ".graphml", ".mtx"])
    def test_compressed(self, tmp_path, kind, suffix):
        plain = tmp_path / f"g{kind}"
        matrix = scipy.sparse.coo_array(([2.0, 2.0], ([0, 1], [1, 0])))
        {
            ".csv": lambda path: csv_file(path, "source,target,weight\n1,2,2\n"),
            ".graphml": lambda path: nx.write_graphml(nx.Graph([("1", "2", {"weight": 2})]), path),
            ".mtx": lambda path: scipy.io.mmwrite(path, matrix),
        }[kind](plain)
        packed = tmp_path / f"g{kind}{suffix}"
        with tables._OPENERS[suffix](packed, "wb") as file:
            file.write(plain.read_bytes())
        assert_edges(read_graph(packed), [("1", "2", 2.0)])

    @pytest.mark.parametrize("damage", ["truncated", "corrupt", "other"])
    @pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
    @pytest.mark.parametrize("kind", [".csv", ".edgelist", ".graphml", ".mtx", ".npz"])
    def test_broken_compression(self, tmp_path, kind, suffix, damage):
        path = tmp_path / f"g{kind}{suffix}"
        with tables._OPENERS[suffix](path, "wb") as file:
            file.write(np.random.default_rng(0).bytes(4000))
        data = bytearray(path.read_bytes())
        if damage == "corrupt":
            data[len(data) // 2] ^= 255
            data[-8] ^= 255
        path.write_bytes(
            {"truncated": data[:-9], "corrupt": data, "other": b"source,target\n0,1\n"}[damage]
        )
        with pytest.raises(FileFormatError, match=f"g{kind}{suffix}.*cannot be read"):
            read_graph(path)

    @pytest.mark.parametrize("at", [150, -20])
    @pytest.mark.parametrize("kind", ["columns", "matrix"])
    def test_broken_archives(self, tmp_path, kind, at):
        path = tmp_path / "g.npz"
        if kind == "columns":
            np.savez_compressed(path, source=np.arange(99), target=np.arange(99) + 1)
        else:
            scipy.sparse.save_npz(path, scipy.sparse.csr_array(np.eye(9, k=1)))
        data = bytearray(path.read_bytes())
        data[at] ^= 255
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match=r"g.npz.*cannot be read"):
            read_graph(path)
        path.write_bytes(data[:at])
        with pytest.raises(FileFormatError, match=r"g.npz.*cannot be read"):
            read_graph(path)

    def test_columns_by_the_callers_names(self, tmp_path):
        text = "source,A,B,Cost\nweb,ann,bob,0.5\nweb,bob,eve,2\nweb,eve,ann,1.25\n"
        nodes = csv_file(tmp_path / "n.csv", "who,start\neve,1\nbob,2\nann,3\n")
        path = csv_file(tmp_path / "e.csv", text)
        read = read_graph(path, nodes, source="A", target="B", weight="Cost", node="who")
        assert_edges(read)
        assert read.x0.tolist() == [1.0, 2.0, 3.0]
        assert read.notes == ("e.csv: ignored column 'source'",)
        with pytest.raises(FileFormatError, match="column 'C': the column is missing"):
            read_graph(path, source="C", target="B")

    def test_parquet_of_pandas(self, tmp_path):
        columns = {"source": ["ann"], "target": ["bob"], "weight": [0.5], "__index_level_0__": [7]}
        pl.DataFrame(columns).with_columns(pl.col("source").cast(pl.Categorical)).write_parquet(
            tmp_path / "e.parquet"
        )
        read = read_graph(tmp_path / "e.parquet")
        assert_edges(read, [("ann", "bob", 0.5)])
        assert read.notes == ("e.parquet: ignored column '__index_level_0__'",)

    def test_gephis_node_table(self, tmp_path):
        edges = csv_file(tmp_path / "e.csv", "Source,Target,Weight\n1,2,0.5\n")
        text = "Id,Label,Target,timeset\n2,Bob,0.75,\n1,Ann,0.25,\n"
        read = read_graph(edges, csv_file(tmp_path / "n.csv", text))
        assert read.labels == ("2", "1")
        assert read.graph.local[0].target.tolist() == [0.75, 0.25]
        ignored, counted = read.notes
        assert ignored == "n.csv: ignored columns 'Label', 'timeset'"
        assert "a is 1 at the 2 nodes" in counted

    @pytest.mark.parametrize("word", ["", "nan", "NaN", "NA", "null", "None", "N/A"])
    def test_missing_values_have_one_rule(self, tmp_path, word):
        edges = csv_file(tmp_path / "e.csv", f"source,target,weight\n0,1,3\n1,2,{word}\n")
        nodes = csv_file(tmp_path / "n.csv", f"node,a,start\n0,{word},1\n1,2,{word}\n2,1,1\n")
        read = read_graph(edges, nodes)
        assert read.graph.edges[0].weight.tolist() == [3.0, 1.0]
        assert read.graph.local[0].a.tolist() == [0.0, 2.0, 1.0]
        assert read.x0.tolist() == [1.0, 0.0, 1.0]
        assert len(read.notes) == 1

    def test_a_country_may_be_called_na(self, tmp_path):
        read = read_graph(csv_file(tmp_path / "e.csv", "source,target\nNA,DE\nDE,FR\n"))
        assert read.labels == ("NA", "DE", "FR")
        (note,) = read.notes
        assert note.startswith("e.csv: 'NA' in column 'source' is the name of a node")

    def test_no_value_is_judged_beside_all_ids(self, tmp_path):
        read = read_graph(csv_file(tmp_path / "e.csv", "source,target\n1,a\nnan,b\n1.5,nan\n"))
        assert read.labels == ("1", "a", "nan", "b", "1.5")
        assert len(read.notes) == 2
        edges = csv_file(tmp_path / "e.csv", "source,target\n0,1\n")
        nodes = csv_file(tmp_path / "n.csv", "node,start\n0,1\n1,1\nNA,1\n")
        with pytest.raises(FileFormatError, match=r"n.csv, line 4, column 'node': 'NA' stands for"):
            read_graph(edges, nodes)

    @pytest.mark.parametrize("word", ["nan", "NA", "null"])
    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz"])
    def test_no_value_is_no_id_among_numbers(self, tmp_path, word, suffix):
        for ends in (["0", "1.0"], ["1", word]), ([0, 1], [word, word]):
            columns = dict(zip(("source", "target"), ends, strict=True))
            with pytest.raises(FileFormatError, match=f"{word!r} stands for no value") as caught:
                read_graph(write_table(tmp_path / f"e{suffix}", columns))
            assert caught.value.column == "target"

    @pytest.mark.parametrize(
        ("text", "first"),
        [
            ("5 4\n0 1\n1 2\n2 3\n3 4\n", "5 4, is read as an edge: remove it if it says that"),
            ("0,1,2\n5,6,0.5\n", "0, 1, 2, is read as an edge: remove it if it numbers the col"),
            ("0,1\n1,2\n2,3\n3,1\n", "0, 1, is read as an edge: remove it if it numbers the col"),
            ("0 1\n1 2\n2 0\n", None),
            ("0 1\n", None),
        ],
    )
    def test_a_first_line_that_may_be_none_is_told(self, tmp_path, text, first):
        read = read_graph(csv_file(tmp_path / "e.txt", text))
        assert read.graph.num_edges == text.count("\n")
        told = [note for note in read.notes if "its first line" in note]
        assert len(told) == (first is not None)
        assert all(f"its first line, {first}" in note for note in told)

    @pytest.mark.parametrize("engine", ["polars", "numpy", "careful"])
    @pytest.mark.parametrize(
        ("weight", "told"),
        [("1e-400", 1), ("1.5E-4000", 1), (f"0.{'0' * 400}1", 1), ("0e-400", 0), ("0.0", 0)],
    )
    def test_a_weight_that_underflows_is_told(self, tmp_path, monkeypatch, engine, weight, told):
        if engine == "numpy":
            monkeypatch.setitem(sys.modules, "polars", None)
        elif engine == "careful":
            monkeypatch.setattr(tables, "_fast_cells", lambda *parts: None)
        read = read_graph(csv_file(tmp_path / "e.csv", f"source,target,w\n0,1,{weight}\n1,2,1\n"))
        assert read.graph.edges[0].weight.tolist() == [0.0, 1.0]
        assert sum("1 of 2 cells of column 'w' are too small" in n for n in read.notes) == told
        text = f"%%MatrixMarket matrix coordinate real general\n3 3 2\n1 2 {weight}\n2 3 1\n"
        read = read_graph(csv_file(tmp_path / "m.mtx", text))
        assert read.graph.edges[0].weight.tolist() == [0.0, 1.0]
        assert sum("1 entry is too small for float64" in n for n in read.notes) == told

    def test_not_utf8_names_the_line(self, tmp_path):
        path = tmp_path / "e.csv"
        path.write_bytes("source,target\nann,bob\nJürg,ann\n".encode("latin-1"))
        with pytest.raises(FileFormatError, match="save it as UTF-8") as caught:
            read_graph(path)
        assert caught.value.line == 3

    def test_tables_of_numbers(self, tmp_path):
        path = csv_file(tmp_path / "t.csv", "step;energy\n0;0,5\n1;\n")
        columns = read_columns(path)
        np.testing.assert_array_equal(columns["energy"], [0.5, np.nan])

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("t.csv", "step,energy\n", "the file is empty: it holds no rows"),
            ("t.jsonl", "", "the file is empty"),
            ("t.jsonl", '{"step": 0}\n{"step"', "line 2: the line cannot be read"),
            ("t.jsonl", "3\n", "line 1: the line is no JSON object"),
            ("t.jsonl", '{"step": "x"}\n', "line 1, column 'step': 'x' is not a number"),
        ],
    )
    def test_tables_without_numbers(self, tmp_path, name, text, message):
        with pytest.raises(FileFormatError, match=message):
            read_columns(csv_file(tmp_path / name, text))

    def test_folders_without_parts(self, tmp_path):
        with pytest.raises(FileFormatError, match=r"the folder holds no part-\*.parquet"):
            read_columns(tmp_path)
        with pytest.raises(IsADirectoryError):
            read_graph(tmp_path)
        csv_file(tmp_path / "telemetry.csv", "energy\n2.5\n")
        assert read_columns(tmp_path)["energy"].tolist() == [2.5]


class TestOtherTables:
    @pytest.mark.parametrize("suffix", [".parquet", ".npz"])
    @pytest.mark.parametrize(
        ("columns", "line", "column", "message"),
        [
            ({"source": [0, 1]}, None, "target", "missing"),
            ({"source": [0, 1], "target": [1, 1]}, 2, "target", "row 2.*also the source"),
            ({"source": [0, -1], "target": [1, 1]}, 2, "source", "-1 is not a node number"),
            ({"source": [0.0, 1.5], "target": [1, 2]}, 2, "source", "1.5 is neither"),
            ({"source": [0, 1], "target": [1, 2], "weight": [1, -1]}, 2, "weight", "at least 0"),
            ({"source": [0], "target": [1], "weight": [np.inf]}, 1, "weight", "finite"),
            ({"source": [0.0, np.nan], "target": [1, 2]}, 2, "source", "the cell is empty"),
            ({"source": [0], "target": [1], "weight": ["x"]}, 1, "weight", "not a number"),
            ({"source": [0], "target": [1], "family": ["x"]}, 1, "family", "unknown"),
        ],
    )
    def test_names_row_and_column(self, tmp_path, suffix, columns, line, column, message):
        path = write_table(tmp_path / f"edges{suffix}", columns)
        with pytest.raises(FileFormatError, match=message) as caught:
            read_graph(path)
        error = caught.value
        assert (error.path, error.line, error.column) == (path, line, column)

    def test_empty_tables(self, tmp_path, suffix):
        path = write_table(tmp_path / f"edges{suffix}", {"source": [], "target": []})
        with pytest.raises(FileFormatError, match="empty"):
            read_graph(path)

    @pytest.mark.parametrize("suffix", [".parquet", ".npz", ".graphml", ".mtx"])
    @pytest.mark.parametrize("content", [b"", b"neither fish nor fowl\n"])
    def test_not_that_format(self, tmp_path, suffix, content):
        path = tmp_path / f"edges{suffix}"
        path.write_bytes(content)
        with pytest.raises(FileFormatError):
            read_graph(path)

    @pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npz", ".graphml", ".mtx"])
    def test_no_file(self, tmp_path, suffix):
        with pytest.raises(FileNotFoundError):
            read_graph(tmp_path / f"edges{suffix}")

    def test_ragged_arrays(self, tmp_path):
        np.savez(tmp_path / "e.npz", source=[0, 1], target=[1, 2], weight=[1.0])
        with pytest.raises(FileFormatError, match=r"'weight'.*shape \(1,\)"):
            read_graph(tmp_path / "e.npz")

    @pytest.mark.parametrize("name", ["edges", "edge_index"])
    def test_both_ends_in_one_array(self, tmp_path, name):
        ends = np.array([[0, 1], [1, 2], [2, 0]])
        ends = ends if name == "edges" else ends.T
        np.savez(tmp_path / "e.npz", **{name: ends, "weight": [0.5, 2.0, 1.25]})
        read = read_graph(tmp_path / "e.npz")
        assert_edges(read, [("0", "1", 0.5), ("1", "2", 2.0), ("2", "0", 1.25)])
        np.savez(tmp_path / "e.npz", **{name: ends.T})
        with pytest.raises(FileFormatError, match=rf"{name}.*has shape .*for each end"):
            read_graph(tmp_path / "e.npz")

    def test_other_arrays_are_left_out(self, tmp_path):
        np.savez(
            tmp_path / "g.npz",
            edge_index=[[0, 1], [1, 2]], x=np.ones((3, 5)), num_nodes=3, y=np.ones(3),
        )  # fmt: skip
        read = read_graph(tmp_path / "g.npz")
        assert_edges(read, [("0", "1", 1.0), ("1", "2", 1.0)])
        assert read.notes == (
            "g.npz: ignored array 'x' of shape (3, 5), array 'num_nodes' of shape (), array 'y' of "
            "shape (3,); every weight is 1 (a weight is an array of one number an edge)",
        )

    def test_weights_of_another_shape_are_told(self, tmp_path):
        ends = {"edge_index": [[0, 1], [1, 2]], "edge_attr": np.full((2, 1), 0.5)}
        np.savez(tmp_path / "g.npz", **ends)
        (note,) = read_graph(tmp_path / "g.npz").notes
        assert "array 'edge_attr' of shape (2, 1); every weight is 1" in note
        np.savez(tmp_path / "g.npz", edge_weight=np.full(2, 0.5), **ends)
        assert_edges(read_graph(tmp_path / "g.npz"), [("0", "1", 0.5), ("1", "2", 0.5)])

    def test_arrays_that_are_no_columns(self, tmp_path):
        np.savez(tmp_path / "e.npz", source=np.zeros((3, 1)), target=np.ones((3, 1)))
        with pytest.raises(FileFormatError, match=r"expected \[E\].*an array of one axis"):
            read_graph(tmp_path / "e.npz")

    def test_pickled_arrays_are_not_loaded(self, tmp_path):
        np.savez(tmp_path / "e.npz", source=np.array([0, "a"], object), target=[1, 2])
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_graph(tmp_path / "e.npz")

    @pytest.mark.parametrize("name", ["edges.xlsx", "edges"])
    def test_unknown_suffix(self, tmp_path, name):
        with pytest.raises(FileFormatError, match=r"unknown suffix.*\.csv.*\.mtx"):
            read_graph(tmp_path / name)
        edges = csv_file(tmp_path / "e.csv", "source,target\n0,1\n")
        with pytest.raises(FileFormatError, match="unknown suffix"):
            read_graph(edges, tmp_path / name)

    def test_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "polars", None)
        with pytest.raises(ImportError, match=r"pip install 'smallgain_jax\[parquet\]'"):
            read_graph(tmp_path / "e.parquet")


class TestGraphml:
    @pytest.mark.parametrize("kind", [nx.DiGraph, nx.MultiDiGraph, nx.Graph])
    def test_agrees_with_networkx(self, tmp_path, kind):
        network = kind()
        network.add_nodes_from(["lone", "c", "b", "a"], colour="red")
        network.add_edge("a", "b", weight=0.5, width=3)
        network.add_edge("b", "c", family="gate_benefit", delta=0.1)
        network.add_edge("a", "c")
        nx.write_graphml(network, tmp_path / "g.graphml")
        read = read_graph(tmp_path / "g.graphml")
        assert_same(read.graph, from_networkx(network))
        assert read.labels == ("lone", "c", "b", "a")
        assert read.x0 is None

    def test_node_attributes(self, tmp_path):
        network = nx.path_graph(3)
        network.nodes[1].update(a=0.5, b=1.0, target=0.25, start=2.0)
        nx.write_graphml(network, tmp_path / "g.graphml")
        read = read_graph(tmp_path / "g.graphml")
        a, b, t = ([0.0, value, 0.0] for value in (0.5, 1.0, 0.25))
        expected = from_networkx(network, Landau(np.array(a), np.array(b), np.array(t)))
        assert_same(read.graph, expected)
        assert read.x0.tolist() == [0.0, 2.0, 0.0]

    def test_a_node_table_replaces_them(self, tmp_path):
        network = nx.path_graph(2)
        network.nodes[1]["a"] = 0.5
        nx.write_graphml(network, tmp_path / "g.graphml")
        nodes = csv_file(tmp_path / "n.csv", "node,start\n1,1\n0,3\n")
        read = read_graph(tmp_path / "g.graphml", nodes)
        assert (read.graph.local, read.x0.tolist()) == ((), [3.0, 1.0])

    @pytest.mark.parametrize(
        ("attributes", "column"),
        [({"weight": -1}, "weight"), ({"weight": "x"}, "weight"), ({"family": "x"}, "family")],
    )
    def test_names_the_edge(self, tmp_path, attributes, column):
        network = nx.DiGraph([("a", "b")])
        network.add_edge("b", "c", **attributes)
        nx.write_graphml(network, tmp_path / "g.graphml")
        with pytest.raises(FileFormatError, match=f"edge 'b' - 'c', column '{column}'") as caught:
            read_graph(tmp_path / "g.graphml")
        assert (caught.value.line, caught.value.column) == (None, column)

    def test_names_the_node(self, tmp_path):
        network = nx.path_graph(2)
        network.nodes[1]["b"] = -1.0
        nx.write_graphml(network, tmp_path / "g.graphml")
        with pytest.raises(FileFormatError, match="node '1', column 'b'"):
            read_graph(tmp_path / "g.graphml")

    def test_self_loop_and_no_edges(self, tmp_path):
        nx.write_graphml(nx.Graph([("a", "a")]), tmp_path / "loop.graphml")
        with pytest.raises(FileFormatError, match="also the source"):
            read_graph(tmp_path / "loop.graphml")
        nx.write_graphml(nx.empty_graph(2), tmp_path / "none.graphml")
        with pytest.raises(FileFormatError, match="the graph is empty: it has no edge"):
            read_graph(tmp_path / "none.graphml")

    def test_names_the_line_of_broken_xml(self, tmp_path):
        path = csv_file(tmp_path / "g.graphml", "<graphml>\n<graph>\n</graphml>\n")
        with pytest.raises(FileFormatError) as caught:
            read_graph(path)
        assert caught.value.line == 3
        path = csv_file(tmp_path / "g.graphml", '<?xml version="1.0" encoding="utf-6"?><graphml/>')
        with pytest.raises(FileFormatError, match="unknown encoding"):
            read_graph(path)


class TestMatrixMarket:
    @pytest.mark.parametrize("symmetry", ["symmetric", "general"])
    def test_agrees_with_scipy(self, tmp_path, symmetry):
        matrix = scipy.sparse.triu(scipy.sparse.random_array((9, 9), density=0.3, rng=0), 1)
        if symmetry == "symmetric":
            matrix = matrix + matrix.T
        scipy.io.mmwrite(tmp_path / "m.mtx", matrix, symmetry=symmetry)
        read = read_graph(tmp_path / "m.mtx")
        assert_same(read.graph, from_scipy(matrix))
        assert read.labels == tuple("123456789")
        assert read.edges.tolist() == list(range(read.graph.num_edges))

    def test_patterns_and_a_node_table(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate pattern general\n3 3 2\n1 2\n3 1\n"
        path = csv_file(tmp_path / "m.mtx", text)
        nodes = csv_file(tmp_path / "n.csv", "node,a,start\n2,1,2\n0,2,0\n1,3,1\n")
        read = read_graph(path, nodes)
        assert_same(read.graph, from_edge_list([(0, 1), (2, 0)], Landau(np.array([2.0, 3.0, 1.0]))))
        assert read.x0.tolist() == [0.0, 1.0, 2.0]

    @pytest.mark.parametrize(
        ("head", "body", "message"),
        [
            ("real general", "3 3 1\n2 2 1.0\n", "is empty: it has no entry off the diagonal"),
            ("real general", "3 3 1\n2 1 -1.0\n", r"matrix\[2, 1\] = -1.0 must.*Laplacian"),
            ("real general", "3 2 1\n2 1 1.0\n", "shape"),
            ("complex general", "3 3 1\n2 1 1.0 1.0\n", "real"),
            ("real general", "3 3 0\n", "is empty: it has no entry off the diagonal"),
            # SciPy 1.17 dies of it
            ("real general", "3 3 2\n1 2 1.0\0\n2 3 1.0\n", "line 3: the line holds a NUL byte"),
        ],
    )
    def test_names_the_entry(self, tmp_path, head, body, message):
        text = f"%%MatrixMarket matrix coordinate {head}\n{body}"
        with pytest.raises(FileFormatError, match=message):
            read_graph(csv_file(tmp_path / "m.mtx", text))

    def test_names_the_line(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate real general\n3 3 2\n2 1 1.0\n3 1 x\n"
        with pytest.raises(FileFormatError) as caught:
            read_graph(csv_file(tmp_path / "m.mtx", text))
        assert caught.value.line == 4

    def test_what_follows_the_last_entry(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate real general\n2 2 1\n2 1 7 x"
        assert_edges(read_graph(csv_file(tmp_path / "m.mtx", text)), [("2", "1", 7.0)])

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    def test_an_editors_mark(self, tmp_path, encoding):
        text = "%%MatrixMarket matrix coordinate real general\n2 2 1\n2 1 7\n"
        (tmp_path / "m.mtx").write_bytes(text.encode(encoding))
        assert_edges(read_graph(tmp_path / "m.mtx"), [("2", "1", 7.0)])


GRAPHML = """<?xml version="1.0" encoding="UTF-8"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
  {keys}
  <graph id="G" edgedefault="undirected">
    {body}
  </graph>
</graphml>
"""


def graphml(path, keys, body):
    return csv_file(path, GRAPHML.format(keys=keys, body=body))


def key(name, of, kind="double", default=None):
    inner = "" if default is None else f"<default>{default}</default>"
    return f'<key id="{of}_{name}" for="{of}" attr.name="{name}" attr.type="{kind}">{inner}</key>'


NODES = '<node id="n0"/><node id="n1"/><node id="n2"/>'


class TestGraphmlOfOthers:
    @pytest.mark.parametrize("of", ["edge", "all"])
    def test_defaults_of_edges(self, tmp_path, of):
        data = f'<data key="{of}_weight">0.5</data>'
        edges = f'<edge source="n0" target="n1"/><edge source="n1" target="n2">{data}</edge>'
        read = read_graph(
            graphml(tmp_path / "g.graphml", key("weight", of, default=5), NODES + edges)
        )
        assert_edges(read, [("n0", "n1", 5.0), ("n1", "n2", 0.5)])

    @pytest.mark.parametrize("value", ["", " ", "NaN"])
    def test_an_edge_without_a_value_has_the_default(self, tmp_path, value):
        edge = f'<edge source="n0" target="n1"><data key="edge_weight">{value}</data></edge>'
        keys = key("weight", "edge", default=5)
        assert_edges(
            read_graph(graphml(tmp_path / "g.graphml", keys, NODES + edge)), [("n0", "n1", 5.0)]
        )

    @pytest.mark.parametrize(
        ("labels", "used"),
        [
            (("0.5", "1.5", "2.5"), False),
            (("-1", "0", "1"), False),
            (("1", "1.0", "2"), False),
            (("a", "nan", "b"), False),
            (("4", "5.0", "6"), True),
            (("0.5", "b", "c"), True),
        ],
    )
    def test_labels_that_cannot_be_ids_stay_attributes(self, tmp_path, labels, used):
        nodes = "".join(
            f'<node id="n{k}"><data key="node_label">{label}</data></node>'
            for k, label in enumerate(labels)
        )
        edges = '<edge source="n0" target="n1"/><edge source="n1" target="n2"/>'
        path = graphml(tmp_path / "g.graphml", key("label", "node"), nodes + edges)
        read = read_graph(path)
        expected = tuple(label.removesuffix(".0") for label in labels)
        assert read.labels == (expected if used else ("n0", "n1", "n2"))

    def test_defaults_of_nodes(self, tmp_path):
        keys = key("a", "node", default=2) + key("Start", "node", default="0.25")
        nodes = '<node id="n0"/><node id="n1"><data key="node_a">3</data></node>'
        read = read_graph(
            graphml(tmp_path / "g.graphml", keys, nodes + '<edge source="n0" target="n1"/>')
        )
        assert read.graph.local[0].a.tolist() == [2.0, 3.0]
        assert read.x0.tolist() == [0.25, 0.25]

    def test_names_of_igraph(self, tmp_path):
        # as igraph's write_graphml lays it out
        keys = key("name", "node", "string") + key("Weight", "edge")
        nodes = "".join(
            f'<node id="n{k}"><data key="node_name">{name}</data></node>'
            for k, name in enumerate(("Ann", "Bob"))
        )
        edge = '<edge source="n1" target="n0"><data key="edge_Weight">2</data></edge>'
        read = read_graph(graphml(tmp_path / "g.graphml", keys, nodes + edge))
        # an undirected edge keeps the direction in which it is written
        assert_edges(read, [("Bob", "Ann", 2.0)])
        assert read.labels == ("Ann", "Bob")
        assert read.notes == ("g.graphml: nodes are called by their attribute 'name'",)

    def test_names_that_are_not_unique_stay_attributes(self, tmp_path):
        keys = key("name", "node", "string")
        nodes = "".join(f'<node id="n{k}"><data key="node_name">x</data></node>' for k in range(2))
        read = read_graph(
            graphml(tmp_path / "g.graphml", keys, nodes + '<edge source="n0" target="n1"/>')
        )
        assert read.labels == ("n0", "n1")
        assert read.notes == ("g.graphml: ignored column 'name'",)

    def test_vector_types_of_graph_tool(self, tmp_path):
        keys = key("pos", "node", "vector_double") + key("weight", "edge", "short")
        nodes = '<node id="n0"><data key="node_pos">0.1, 0.2</data></node><node id="n1"/>'
        edge = '<edge id="e0" source="n0" target="n1"><data key="edge_weight">3</data></edge>'
        read = read_graph(graphml(tmp_path / "g.graphml", keys, nodes + edge))
        assert_edges(read, [("n0", "n1", 3.0)])
        assert read.notes == ("g.graphml: ignored column 'pos'",)

    def test_a_vector_where_a_number_belongs_is_named(self, tmp_path):
        keys = key("a", "node", "vector_double")
        nodes = '<node id="n0"><data key="node_a">0.1, 0.2</data></node><node id="n1"/>'
        path = graphml(tmp_path / "g.graphml", keys, nodes + '<edge source="n0" target="n1"/>')
        with pytest.raises(FileFormatError, match=r"node 'n0', column 'a': '0.1, 0.2' is not"):
            read_graph(path)

    def test_nested_graphs_are_part_of_the_whole(self, tmp_path):
        inner = '<node id="n1::0"/><node id="n1::1"/><edge source="n1::0" target="n1::1"/>'
        body = (
            f'<node id="n0"/><node id="n1"><graph edgedefault="undirected">{inner}</graph></node>'
            '<edge source="n0" target="n1::0"/>'
        )
        read = read_graph(graphml(tmp_path / "g.graphml", "", body))
        assert_edges(read, [("n1::0", "n1::1", 1.0), ("n0", "n1::0", 1.0)])
        assert read.notes == (
            "g.graphml: 1 nested graph is read as part of the whole",
            "1 node has no edge: 'n1'",
        )

    def test_parallel_edges(self, tmp_path):
        edges = '<edge source="n0" target="n1"/><edge source="n1" target="n0"/>'
        read = read_graph(graphml(tmp_path / "g.graphml", "", NODES + edges))
        assert_edges(read, [("n0", "n1", 1.0), ("n1", "n0", 1.0)])

    def test_missing_values(self, tmp_path):
        keys = key("weight", "edge") + key("a", "node")
        nodes = "".join(
            f'<node id="n{k}"><data key="node_a">{a}</data></node>'
            for k, a in enumerate(("NaN", "", "2"))
        )
        edges = (
            '<edge source="n0" target="n1"><data key="edge_weight">nan</data></edge>'
            '<edge source="n1" target="n2"><data key="edge_weight">3</data></edge>'
        )
        read = read_graph(graphml(tmp_path / "g.graphml", keys, nodes + edges))
        assert_edges(read, [("n0", "n1", 1.0), ("n1", "n2", 3.0)])
        assert read.graph.local[0].a.tolist() == [0.0, 0.0, 2.0]

    def test_a_colour_is_no_energy(self, tmp_path):
        keys = "".join(key(name, "node", "int") for name in "rgb")
        colour = "".join(f'<data key="node_{name}">153</data>' for name in "rgb")
        nodes = f'<node id="n0">{colour}</node><node id="n1">{colour}</node>'
        read = read_graph(
            graphml(tmp_path / "g.graphml", keys, nodes + '<edge source="n0" target="n1"/>')
        )
        assert read.graph.local == ()
        assert read.notes == ("g.graphml: r, g and b of the nodes are a colour, not energies",)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ('<node id="n0"/><edge source="n0" target="n9"/>', "ends at node 'n9', never declared"),
            ('<node id="n0"/><node id="n0"/>', "node 'n0' is declared twice"),
            ("<hyperedge/>", "a hyperedge joins more than two nodes"),
            ('<node id="n0"><data key="k">1</data></node>', "<data key='k'> has no <key>"),
            ("</graph><graph>", "holds 2 graphs"),
        ],
    )
    def test_what_is_not_read_is_named(self, tmp_path, body, message):
        with pytest.raises(FileFormatError, match=message):
            read_graph(graphml(tmp_path / "g.graphml", "", body))

    def test_nodes_of_a_table(self, tmp_path):
        path = graphml(tmp_path / "g.graphml", "", NODES + '<edge source="n2" target="n0"/>')
        nodes = csv_file(tmp_path / "n.csv", "node,start\nn2,1\nn1,2\nn0,3\n")
        read = read_graph(path, nodes)
        assert_edges(read, [("n2", "n0", 1.0)])
        assert read.labels == ("n2", "n1", "n0")


class TestMatrices:
    def test_a_diagonal_is_dropped_with_a_note(self, tmp_path):
        matrix = scipy.sparse.coo_array([[4.0, 0.5, 0.0], [0.5, 3.0, 2.0], [0.0, 2.0, 1.0]])
        scipy.io.mmwrite(tmp_path / "m.mtx", matrix, symmetry="symmetric")
        scipy.sparse.save_npz(tmp_path / "m.npz", matrix.tocsr())
        for name, labels in (("m.mtx", "123"), ("m.npz", "012")):
            read = read_graph(tmp_path / name)
            a, b, c = labels
            assert_edges(read, [(a, b, 0.5), (b, c, 2.0)])
            assert read.notes == (
                f"{name}: ignored 3 entries on the diagonal: they join no two nodes",
            )
        own = scipy.sparse.coo_array([[0.0, 1.0], [1.0, 2.0]])
        scipy.io.mmwrite(tmp_path / "m.mtx", own)
        (note,) = read_graph(tmp_path / "m.mtx").notes
        assert note == "m.mtx: ignored 1 entry on the diagonal: it joins no two nodes"

    @pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
    def test_save_npz(self, tmp_path, kind):
        dense = np.diag([1.0, 2.0, 3.0], 1)
        matrix = scipy.sparse.coo_array(dense + dense.T).asformat(kind)
        scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
        read = read_graph(tmp_path / "m.npz")
        assert_edges(read, [("0", "1", 1.0), ("1", "2", 2.0), ("2", "3", 3.0)])

    def test_pattern_symmetric_and_integer(self, tmp_path):
        pattern = "%%MatrixMarket matrix coordinate pattern symmetric\n% made\n3 3 2\n2 1\n3 2\n"
        read = read_graph(csv_file(tmp_path / "p.mtx", pattern))
        assert_edges(read, [("1", "2", 1.0), ("2", "3", 1.0)])
        integer = "%%MatrixMarket matrix coordinate integer general\n2 2 1\n2 1 7\n"
        assert_edges(read_graph(csv_file(tmp_path / "i.mtx", integer)), [("2", "1", 7.0)])

    def test_isolated_rows_are_reported(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate real general\n4 4 1\n2 1 7\n"
        read = read_graph(csv_file(tmp_path / "m.mtx", text))
        assert read.graph.num_nodes == 4
        assert read.notes == ("2 nodes have no edge: '3', '4'",)

    def test_a_decimal_comma_is_refused(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate real general\n% a, b\n2 2 1\n1 2 0,5\n"
        with pytest.raises(FileFormatError, match="write a decimal point") as caught:
            read_graph(csv_file(tmp_path / "m.mtx", text))
        assert caught.value.line == 4

    def test_nodes_that_the_node_table_lacks_are_told(self, tmp_path):
        text = "%%MatrixMarket matrix coordinate real general\n3 3 1\n1 2 0.5\n"
        nodes = csv_file(tmp_path / "n.csv", "node,start\n1,1\n2,2\n")
        read = read_graph(csv_file(tmp_path / "m.mtx", text), nodes)
        assert read.labels == ("1", "2")
        assert read.notes == ("m.mtx: 1 of its 3 nodes are not in the node table: left out",)

    def test_how_an_asymmetric_matrix_counts_is_told(self, tmp_path):
        scipy.io.mmwrite(tmp_path / "m.mtx", scipy.sparse.coo_array([[0.0, 3.0], [1.0, 0.0]]))
        read = read_graph(tmp_path / "m.mtx")
        assert_edges(read, [("1", "2", 3.0), ("2", "1", 1.0)])
        (note,) = read.notes
        assert "[1, 2] = 3 and [2, 1] = 1 are two edges, which weigh 4 together" in note
        for how, weight in (("mean", 2.0), ("sum", 4.0), ("max", 3.0)):
            read = read_graph(tmp_path / "m.mtx", symmetrize=how)
            assert_edges(read, [("1", "2", weight)])
            assert read.notes == ()

    @pytest.mark.parametrize("first", [0, 1])
    def test_node_tables_may_count_from_zero_or_one(self, tmp_path, first):
        text = "%%MatrixMarket matrix coordinate real general\n3 3 2\n2 1 7\n3 2 5\n"
        nodes = f"node,start\n{first + 1},0.5\n{first},0.25\n{first + 2},0.75\n"
        path = csv_file(tmp_path / "m.mtx", text)
        read = read_graph(path, csv_file(tmp_path / "n.csv", nodes))
        start = dict(zip(read.labels, read.x0.tolist(), strict=True))
        assert [start[str(k + first)] for k in range(3)] == [0.25, 0.5, 0.75]
        ends = [(read.labels[i], read.labels[j]) for i, j in zip(read.graph.i, read.graph.j)]
        assert ends == [(str(1 + first), str(first)), (str(2 + first), str(1 + first))]

    def test_missing_entries_are_refused(self, tmp_path):
        matrix = scipy.sparse.coo_array([[0.0, np.nan], [0.0, 0.0]])
        scipy.sparse.save_npz(tmp_path / "m.npz", matrix)
        with pytest.raises(FileFormatError, match=r"matrix\[0, 1\] = nan must be finite"):
            read_graph(tmp_path / "m.npz")


class TestWriting:
    def test_whole_files_replace_what_was_there(self, tmp_path):
        path = csv_file(tmp_path / "a.txt", "old")
        write_atomic(path, lambda temporary: temporary.write_text("new"))
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("existing", [True, False])
    def test_nothing_half_written_is_left(self, tmp_path, error, existing):
        path = tmp_path / "a.txt"
        if existing:
            path.write_text("old")

        def write(temporary):
            assert temporary.parent == path.parent
            temporary.write_text("half")
            raise error

        with pytest.raises(error):
            write_atomic(path, write)
        assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * existing

    def test_a_failing_state_writer_leaves_nothing(self, tmp_path, suffix, monkeypatch):
        def replace(*paths):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", replace)
        with pytest.raises(OSError, match="disk full"):
            write_state(tmp_path / f"x{suffix}", np.zeros(2), ("a", "b"))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("labels", [("b", "a", "é,\n"), ("2", "0", "1"), ("07", "8", "9")])
    @pytest.mark.parametrize("shape", [(3,), (3, 2)])
    def test_state_round_trips(self, tmp_path, suffix, labels, shape):
        x = jax.random.normal(jax.random.key(0), shape)
        path = tmp_path / f"x{suffix}"
        write_state(path, x, labels)
        node, values = read_state(path)
        numbers = all(label.isdecimal() and str(int(label)) == label for label in labels)
        assert node == ([int(label) for label in labels] if numbers else list(labels))
        assert list(values) == (["x"] if len(shape) == 1 else ["x0", "x1"])
        read = np.stack(list(values.values()), axis=1).astype(x.dtype).reshape(shape)
        np.testing.assert_array_equal(read, np.asarray(x))

    def test_state_of_a_graph_that_was_read(self, tmp_path, suffix):
        path = tmp_path / f"x{suffix}"
        edges = write_table(tmp_path / f"e{suffix}", {"source": ["b"], "target": ["a"]})
        write_state(path, jnp.array([0.5, 1.0]), read_graph(edges).labels)
        assert read_state(path)[0] == ["b", "a"]

    @pytest.mark.parametrize(
        ("name", "x", "labels", "message"),
        [
            ("x.txt", np.zeros(2), ("a", "b"), r"^path = .*x.txt must end in one of .csv"),
            ("x.csv", np.zeros(2), ("a",), r"^labels has 1 entries, expected 2"),
            ("x.csv", np.zeros(()), (), r"^x has shape \(\)"),
        ],
    )
    def test_refuses_before_writing(self, tmp_path, name, x, labels, message):
        with pytest.raises(ValueError, match=message):
            write_state(tmp_path / name, x, labels)
        assert list(tmp_path.iterdir()) == []


def read_state(path):
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            columns = {name: arrays[name] for name in arrays.files}
    else:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else read_csv_typed(path)
        columns = {series.name: series.to_numpy() for series in frame}
    return columns.pop("node").tolist(), columns


def read_csv_typed(path):
    # polars would read "07" as a number
    text = pl.read_csv(path, infer_schema=False)
    plain = text["node"].str.contains(r"^(0|[1-9]\d*)$").all()
    node = pl.col("node").cast(pl.Int64) if plain else pl.col("node")
    return text.with_columns(node, pl.exclude("node").cast(pl.Float64))


@pytest.mark.once
def test_a_table_without_a_line_of_names_is_told_to_have_one(tmp_path):
    path = tmp_path / "edges.csv"
    path.write_text("a,b,0.5\nb,c,0.5\n")
    with pytest.raises(FileFormatError, match="looks like data: put a line of names"):
        read_graph(path)


@pytest.mark.once
def test_targets_alone_count(tmp_path):
    edges = tmp_path / "e.csv"
    edges.write_text("source,target\na,b\nb,c\n")
    nodes = tmp_path / "n.csv"
    nodes.write_text("node,target\na,0.9\nb,\nc,0.2\n")
    read = read_graph(edges, nodes)
    (local,) = read.graph.local
    assert local.a.tolist() == [1, 0, 1]
    assert any("a is 1 at the 2 nodes" in note for note in read.notes)
    nodes.write_text("node,target,a\na,0.9,2\nb,,\nc,0.2,\n")
    assert read_graph(edges, nodes).graph.local[0].a.tolist() == [2, 0, 0]
