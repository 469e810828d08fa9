"""Tables as files have them: columns of cells, and the line that every row stands on.

What the columns mean is decided elsewhere (`columns`). Here a cell is a number, text, or missing:
blank in a delimited file, null in Parquet, NaN in an array.
"""

import bz2
import codecs
import csv
import errno
import functools
import gzip
import importlib
import io
import itertools
import lzma
import operator
import os
import re
import string
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import numpy as np

PathLike = str | os.PathLike[str]

Cells = np.ndarray | list[Any]
"""int64, float64 with NaN where a cell is missing, or a list with None there."""

DELIMITED = (".csv", ".tsv", ".tab", ".txt", ".dat", ".edges", ".edgelist")
TABLES = (*DELIMITED, ".parquet", ".npz")
PARTS = "part-*.parquet"
"""Files of a table that was written in parts, in order, in a folder of their own."""
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

_SEPARATORS = (",", ";", "\t", "|")
COMMENTS = ("#", "%", "//")
_COMMENT = re.compile(r"\n\s*(#|%|//)")
NO_NUMBER = r"\+|-?0\d|-?\d+[eE]\d+"
"""How a cell begins that may be a name, and that a number would not keep as it is: 007, 1e5."""
NOT_ZERO = r"^[^eE]*[1-9]"
"""How text begins that spells another number than 0, even one that underflows to it."""
_TINY = re.compile(r"[eE]-\d{3}|\.0{300}")
"""What the spelling of a number has that underflows."""
ARCHIVE_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile)
"""What reading a damaged, an encrypted or an unknown kind of NPZ archive raises."""
_EXACT = 2.0**53
_EXCEL = re.compile(r"sep=(.|\\t)\s*", re.IGNORECASE)
"""The line before the header by which a spreadsheet tells what parts the cells."""
_PAIRS = {"edges": 1, "edge_list": 1, "edgelist": 1, "edge_index": 0}
"""Arrays that hold both ends of every edge, by the axis of length two."""


class FileFormatError(ValueError):
    """A file that is not what it should be; the message names the file, the line and the column.

    Attributes:
      path: the file.
      line: from 1; in a delimited file the line as an editor shows it, in Parquet and NPZ the row.
        None where the problem has no line.
      column: name of the column, or None.

    >>> raise FileFormatError("edges.csv", 3, "weight", "-1 must be at least 0")
    Traceback (most recent call last):
    smallgain_jax.tools.tables.FileFormatError: edges.csv, line 3, column 'weight': -1 must be at least 0
    """  # noqa: E501

    def __init__(
        self,
        path: PathLike,
        line: int | None,
        column: str | None,
        problem: str,
        *,
        place: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.line = line
        self.column = column
        if place is None and line is not None:
            place = f"line {line}"
        where = [str(path), place, column and f"column {column!r}"]
        super().__init__(f"{', '.join(filter(None, where))}: {problem}")


class Sheet(NamedTuple):
    """A table as its file has it."""

    path: Path
    header: tuple[str, ...]  # () where the file has none; "" for a column without a name
    cells: tuple[Cells, ...]
    place: Callable[[int], tuple[int | None, str]]  # a row's line, and how to call it
    header_line: int | None = None
    separator: str | None = None  # of a delimited file
    notes: tuple[str, ...] = ()
    commented: bool = False  # whether the header is a comment, which may be none
    left_out: tuple[str, ...] = ()  # what else the file holds, and is no column
    empty: str = "the file is empty: it holds no rows"  # what to say where it has none

    @property
    def num_rows(self) -> int:
        return max(map(len, self.cells), default=0)

    def fail(self, row: int, column: str | None, problem: str) -> NoReturn:
        """Raise the error for a cell, or for a row."""
        line, place = self.place(row)
        raise FileFormatError(self.path, line, column, problem, place=place) from None


def suffix_of(path: Path) -> str:
    """What a file is, whether it is compressed or not.

    >>> suffix_of(Path("edges.CSV.gz"))
    '.csv'
    """
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() if last in _OPENERS else last


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file for reading bytes, decompressed if its last suffix says so.

    Raises:
      FileFormatError: what is read inside is not compressed that way, or ends too early.
      OSError: a file that cannot be opened.
    """
    with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            # what the system refuses has a number, what a decompressor does has none
            if getattr(error, "errno", None) is not None:
                raise
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> FileFormatError:
    said = str(error) or type(error).__name__
    return FileFormatError(path, None, None, f"the file cannot be read: {said}")


def refuse_folder(path: Path) -> None:
    """Raise the error of opening a folder as a file, before its name is taken apart."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def read_sheet(
    path: Path, others: Sequence[str] = (), wanted: Callable[[str], bool] = lambda name: True
) -> Sheet:
    """Read a table of any known format.

    Args:
      path: the file.
      others: suffixes to name in the message for an unknown one, besides those known here.
      wanted: whether a column of that name is asked for; arrays that are not are left out, with a
        note, where they are no columns.

    Raises:
      FileFormatError: a malformed file.
      OSError: a file that cannot be opened.
      ImportError: Parquet without polars.
    """
    refuse_folder(path)
    suffix = suffix_of(path)
    if suffix in DELIMITED:
        return _read_delimited(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".npz":
        return _read_npz(path, wanted)
    known = ", ".join((*TABLES, *others))
    raise FileFormatError(
        path, None, None, f"unknown suffix {suffix!r}: known are {known}, compressed or not"
    )


def optional_module(module: str, extra: str) -> Any:
    """A module of an optional dependency, or an ImportError that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for this file: pip install 'smallgain_jax[{extra}]'"
        ) from error


@contextmanager
def as_format_error(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a parser raises into the error that names the file."""
    try:
        yield
    except FileFormatError:
        raise
    except errors as error:
        raise _unreadable(path, error) from error


class _Head(NamedTuple):
    """The first line that is no comment, and what it says about the rest."""

    header: tuple[str, ...]  # () where the first line is data
    separator: str  # " " for any white space
    line: int  # of the header, from 1, or of the comment that holds it
    start: int  # of the header, or of the first row where the header is none or a comment
    first: int  # of the first row

    @property
    def commented(self) -> bool:
        return bool(self.header) and self.start != self.line


def _read_delimited(path: Path) -> Sheet:
    lines = read_lines(path)
    head = _head(path, lines)
    if head is None:
        raise FileFormatError(path, None, None, "the file is empty: it has no header")
    fast = _fast_cells(lines[head.first - 1 :], head)
    if fast is not None:
        first = head.first
        return Sheet(
            path,
            head.header,
            fast,
            lambda row: (first + row, f"line {first + row}"),
            head.line,
            head.separator,
            commented=head.commented,
        )
    return _careful_sheet(path, lines, head)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, their ends included, as they are."""
    with opened(path) as file:
        return io.StringIO(decoded(path, file.read()), newline="").readlines()


def decoded(path: Path, data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with its mark.

    Raises:
      FileFormatError: bytes that are neither, by their line.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        # spreadsheets put a byte order mark first
        encoding = "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileFormatError(
            path, line, None, f"the file cannot be read: {error.reason}: save it as UTF-8"
        ) from error


def _head(path: Path, lines: list[str]) -> _Head | None:
    # a spreadsheet's row of nothing is a row of separators
    nothing = "".join(_SEPARATORS) + string.whitespace
    content = ((k, line) for k, line in enumerate(lines, 1) if line.strip(nothing))
    comment: tuple[int, str] | None = None
    told = None  # the separator, by the file itself
    for k, line in content:
        if told is None and comment is None and (match := _EXCEL.fullmatch(line.strip("\r\n"))):
            told = match[1].replace("\\t", "\t")
            continue
        bare = line.lstrip()
        if bare.startswith(COMMENTS):
            comment = (k, bare.lstrip("#%/ ").strip())
            continue
        following = [text for text in itertools.islice(lines, k, k + 20) if text.strip()]
        separator = told or _separator(line, following)
        cells = _split(line, separator)
        numeric = [_is_number(cell) for cell in cells]
        names = _split(comment[1], separator) if comment else []
        if comment and any(numeric) and len(names) == len(cells):
            # NumPy and collections of networks put their header into a comment
            return _Head(tuple(names), separator, comment[0], k, k)
        if all(numeric):
            return _Head((), separator, k, k, k)
        # a quoted header may go on in the next line: the careful reader takes it whole
        return _Head(tuple(cells), separator, k, k, k + 1)
    return None


def _separator(line: str, following: Iterable[str]) -> str:
    fields = {separator: len(_split(line, separator)) for separator in _SEPARATORS}
    best = max(_SEPARATORS, key=lambda separator: fields[separator])
    if fields[best] > 1:
        return best
    words = _split(line, " ")
    width = len(words)
    sizes = {len(_split(text, " ")) for text in following if not text.lstrip().startswith(COMMENTS)}
    # R's rows have one more cell than its header; numbers are not the name of a single column
    spaced = sizes <= {width, width + 1} or all(map(_is_number, words))
    return " " if width > 1 and spaced else ","


def _split(line: str, separator: str) -> list[str]:
    cells: list[str] = next(_csv_reader([line], separator), [])
    return [cell.strip() for cell in cells]


def _csv_reader(lines: Iterable[str], separator: str) -> Any:
    if separator != " ":
        return csv.reader(lines, delimiter=separator, skipinitialspace=True)
    spaced = (" ".join(line.split()) + "\n" for line in lines)
    return csv.reader(spaced, delimiter=" ", skipinitialspace=True)


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _fast_cells(lines: list[str], head: _Head) -> tuple[Cells, ...] | None:
    """The columns by a parser in C, where every line is a plain row; None where one may not be."""
    text = "".join(lines).rstrip("\r\n")
    # every row after an end of line, the first too
    block = f"\n{text}"
    width = len(head.header) or len(_split(lines[0], head.separator)) if lines else 0
    rows = text.count("\n") + 1
    plain = (
        bool(text)
        and width > 1
        and '"' not in "".join(head.header) + text
        and "\n\n" not in block
        and "\n\r" not in block
        and "\r" not in text.replace("\r\n", "\n")
        and not (any(mark in text for mark in COMMENTS) and _COMMENT.search(block))
        and text.count(head.separator) == rows * (width - 1)
        and len(lines) == rows
    )
    if not plain:
        return None
    try:
        polars = importlib.import_module("polars")
    except ImportError:
        return _fast_numpy(lines, text, head.separator)
    return _fast_polars(polars, text, width, head.separator)


def _fast_polars(polars: Any, text: str, width: int, separator: str) -> tuple[Cells, ...] | None:
    names = [str(c) for c in range(width)]
    try:
        frame = polars.read_csv(
            text.encode(),
            has_header=False,
            new_columns=names,
            separator=separator,
            infer_schema=False,
            quote_char=None,
        )
    except polars.exceptions.PolarsError:
        return None
    columns = [_polars_stripped(frame[name]) for name in frame.columns]
    if len(columns) != width or _has_blank_row(columns):
        return None
    return tuple(_polars_cells(polars, column) for column in columns)


def _polars_stripped(text: Any) -> Any:
    text = text.str.strip_chars()
    return text.set(text == "", None)


def _has_blank_row(columns: list[Any]) -> bool:
    if not all(column.null_count() for column in columns):
        return False
    return bool(functools.reduce(operator.and_, (c.is_null() for c in columns)).any())


def _polars_cells(polars: Any, text: Any) -> Cells:
    missing = text.null_count()
    if not text.str.contains(f"^({NO_NUMBER})").any():
        whole = text.cast(polars.Int64, strict=False)
        if not missing and not whole.null_count():
            return np.asarray(whole.to_numpy(), np.int64)
        number = text.cast(polars.Float64, strict=False)
        # what overflows or underflows, or says nan, keeps its text for the message; a long id its
        # digits
        exact = number.null_count() == missing and (number.abs() < _EXACT).all()
        if exact and not text.filter(number == 0).str.contains(NOT_ZERO).any():
            return np.array(number.to_numpy(), np.float64)
    kept: list[Any] = text.to_list()
    return kept


def _fast_numpy(lines: list[str], text: str, separator: str) -> tuple[Cells, ...] | None:
    if not text.isascii() or _may_be_names(text, separator):
        return None
    first = lines[0].rstrip("\r\n").split(separator)
    kinds = [np.int64 if re.fullmatch(r"-?\d+", cell) else np.float64 for cell in first]
    dtype = np.dtype([(f"c{c}", kind) for c, kind in enumerate(kinds)])
    try:
        with warnings.catch_warnings():
            # older NumPy only warns where it cuts 2.5 down to 2
            warnings.simplefilter("error")
            rows = np.loadtxt(lines, dtype, comments=None, delimiter=separator, ndmin=1)
    except (ValueError, Warning, OverflowError):
        return None
    columns = tuple(np.ascontiguousarray(rows[name]) for name in dtype.names or ())
    if any((c == 0).any() for c in columns if c.dtype.kind == "f") and _TINY.search(text):
        return None
    return columns if all((np.abs(column) < _EXACT).all() for column in columns) else None


def _may_be_names(text: str, separator: str) -> bool:
    """Whether some cell is `NO_NUMBER`, or has white space around it, without a look at each."""
    if " " in text.replace(separator, "") or (separator != "\t" and "\t" in text):
        return True
    data = np.frombuffer(f"{text}\n\n\n".encode(), np.uint8)
    digit = (data >= ord("0")) & (data <= ord("9"))
    start = np.flatnonzero((data == ord(separator)) | (data == ord("\n")))[:-3] + 1
    start = np.concatenate([[0], start])
    after_sign = start + (data[start] == ord("-"))
    padded = (data[after_sign] == ord("0")) & digit[after_sign + 1]
    exponent = np.flatnonzero((data == ord("e")) | (data == ord("E")))
    # that of a fraction cannot be told here from that of a name, and goes the careful way
    return bool((data[start] == ord("+")).any() or padded.any() or digit[exponent + 1].any())


def _careful_sheet(path: Path, lines: list[str], head: _Head) -> Sheet:
    """Row by row, with quotes, comments between the rows, blank lines and every line's number."""
    commented: list[int] = []
    records = _records(path, lines, head.start, head.separator, commented)
    header = head.header
    if header and head.start == head.line:
        header = tuple(name.strip() for name in next(records)[1])
    at, rows = [], []
    for line, cells in records:
        if not any(map(str.strip, cells)):
            # spreadsheets end a table with rows of nothing
            continue
        at.append(line)
        rows.append(cells)
    notes = []
    if commented:
        notes.append(f"line {commented[0]} is a comment" + _more(len(commented), "line"))
    if header and rows and {len(cells) for cells in rows} == {len(header) + 1}:
        # a separator ends every row, or R has named its rows and left that column out of the header
        ended = not any(cells[-1].strip() for cells in rows)
        header = (*header, "") if ended else ("", *header)
    width = len(header) or (len(rows[0]) if rows else 0)
    for line, cells in zip(at, rows, strict=True):
        if len(cells) != width:
            _fail_ragged(path, header, line, len(cells), width, head.separator)
    columns = zip(*rows, strict=True) if rows else (() for _ in header)
    blanked = [[cell.strip() or None for cell in column] for column in columns]
    return Sheet(
        path,
        header,
        tuple(blanked),
        lambda row: (at[row], f"line {at[row]}"),
        head.line,
        head.separator,
        tuple(notes),
        head.commented,
    )


def _records(
    path: Path, lines: list[str], start: int, separator: str, commented: list[int]
) -> Iterator[tuple[int, list[str]]]:
    """Every row with the line it starts on; lines that were left out as comments are collected."""
    began = start
    whole = True

    def content() -> Iterator[str]:
        nonlocal began, whole
        for position, line in enumerate(lines[start - 1 :], start):
            # only inside quotes does a row ask for a second line, and nothing is a comment there
            if whole:
                if not line.strip():
                    continue
                if line.lstrip().startswith(COMMENTS):
                    commented.append(position)
                    continue
                began, whole = position, False
            yield line
        if not whole:
            problem = "a quote is opened in this row and never closed"
            raise FileFormatError(path, began, None, problem)

    reader = _csv_reader(content(), separator)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise FileFormatError(path, began, None, str(error)) from error
        if cells is None:
            return
        whole = True
        yield began, cells


def _fail_ragged(
    path: Path, header: Sequence[str], line: int, size: int, width: int, separator: str
) -> NoReturn:
    # a short row lacks its next column; a long one has no name for the rest
    column = header[size] if size < len(header) else None
    problem = (
        f"the row has {size} cell{'s' * (size != 1)}, the {'header' if header else 'first row'} "
        f"{width} (separated by {shown_separator(separator)})"
    )
    if separator == " " and not header:
        problem += ": if each line holds a node and its neighbours, write an edge a line instead"
    raise FileFormatError(path, line, column or None, problem)


def shown_separator(separator: str) -> str:
    """How a message calls a separator.

    >>> shown_separator("\\t")
    'tabs'
    """
    return {"\t": "tabs", " ": "white space"}.get(separator, repr(separator))


def _more(count: int, what: str) -> str:
    others = count - 1
    return f", as {'is' if others == 1 else 'are'} {others} more" if others else ""


def _row(row: int) -> tuple[int, str]:
    return row + 1, f"row {row + 1}"


def _read_parquet(path: Path) -> Sheet:
    polars = optional_module("polars", "parquet")
    with opened(path) as file, as_format_error(path, polars.exceptions.PolarsError):
        frame = polars.read_parquet(io.BytesIO(file.read()))
    cells = tuple(_series_cells(polars, series) for series in frame)
    return Sheet(path, tuple(frame.columns), cells, _row)


def _series_cells(polars: Any, series: Any) -> Cells:
    kind = series.dtype
    if kind.is_integer() and not series.null_count():
        return array_cells(series.to_numpy())
    if kind.is_numeric():
        return np.array(series.cast(polars.Float64).to_numpy(), np.float64)
    if kind in (polars.Categorical, polars.Enum):
        series = series.cast(polars.String)
    return stripped(series.to_list())


def _read_npz(path: Path, wanted: Callable[[str], bool]) -> Sheet:
    columns = _ends_apart(path, read_arrays(path))
    size = max((a.shape[0] for k, a in columns.items() if a.ndim == 1 and wanted(k)), default=0)
    beside = {k: a.shape for k, a in columns.items() if a.shape != (size,) and not wanted(k)}
    columns = {name: array for name, array in columns.items() if name not in beside}
    left_out = tuple(f"array {name!r} of shape {shape}" for name, shape in beside.items())
    for name, array in columns.items():
        if array.shape != (size,):
            expected = f"({size},), one entry a row" if size else "[E], one entry a row"
            hint = "" if array.ndim == 1 else ": a column is an array of one axis"
            problem = f"the array has shape {array.shape}, expected {expected}{hint}"
            raise FileFormatError(path, None, name, problem)
    cells = tuple(map(array_cells, columns.values()))
    return Sheet(path, tuple(columns), cells, _row, left_out=left_out)


def _ends_apart(path: Path, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns with an array of both ends as two, as libraries of graph networks keep them."""
    names = [name for name in columns if name.casefold() in _PAIRS]
    if not names or "source" in columns:
        return columns
    name, axis = names[0], _PAIRS[names[0].casefold()]
    ends = columns.pop(name)
    if ends.ndim != 2 or ends.shape[axis] != 2:
        expected = ("(2, E), a row for each end", "(E, 2), a column for each end")[axis]
        problem = f"the array has shape {ends.shape}, expected {expected}"
        raise FileFormatError(path, None, name, problem)
    source, target = np.moveaxis(ends, axis, 0)
    return {"source": source, "target": target, **columns}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an NPZ file by name; pickled objects are refused."""
    with opened(path) as file, as_format_error(path, *ARCHIVE_ERRORS):
        arrays = np.load(io.BytesIO(file.read()), allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it holds one array without a name")
        with arrays:
            # each look-up reads the archive anew
            return {name: arrays[name] for name in arrays.files}


def array_cells(array: np.ndarray) -> Cells:
    """An array as a column."""
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    if array.dtype.kind == "f":
        return array.astype(np.float64)
    if array.dtype.kind in "iu" and (not array.size or array.max() <= np.iinfo(np.int64).max):
        return array.astype(np.int64)
    return stripped(array.tolist())


def stripped(cells: list[Any]) -> list[Any]:
    """Cells without the white space around text; blank ones are missing."""
    return [(cell.strip() or None) if isinstance(cell, str) else cell for cell in cells]
