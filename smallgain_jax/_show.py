"""How results show themselves: a screen of text at any size, and a table in a notebook."""

import html
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

FEW = 6
"""Entries of a vector that are shown one by one."""
LINES = 40
DEPTH = 2
"""Levels of tuples that are opened; what lies deeper is named."""

_Class = TypeVar("_Class", bound=type)


def shows(
    curve: str | None = None,
    bars: str | None = None,
    words: Mapping[str, Callable[[Any], str]] | None = None,
    labels: str | None = None,
    labelled: tuple[str, ...] = (),
    first: tuple[str, ...] = (),
) -> Callable[[_Class], _Class]:
    """Give a named tuple a short `repr`, and a table with a plot in notebooks.

    Args:
      curve: path of the field (as "info.history") that is drawn as a line.
      bars: of the field that is drawn as bars.
      words: what to say of a field, by its name, where it is known (not traced).
      labels: path of the field that names the entries of others.
      labelled: the fields whose entries it names.
      first: the fields that a reader looks for, before the others.
    """

    def decorate(cls: _Class) -> _Class:
        setattr(cls, "_words", words or {})  # noqa: B010
        setattr(cls, "_labels", (labels, labelled))  # noqa: B010
        setattr(cls, "_first", first)  # noqa: B010
        setattr(cls, "__repr__", text)  # noqa: B010  # of a class whose type is not known
        setattr(cls, "_repr_html_", lambda self: _page(self, curve, bars))  # noqa: B010
        return cls

    return decorate


def text(value: Any) -> str:
    """A named tuple, a field a line, at most `LINES` of them."""
    lines = list(_lines(value, DEPTH))
    if len(lines) > LINES:
        lines = [*lines[: LINES - 2], "  ...", lines[-1]]
    return "\n".join(lines)


def _lines(value: Any, depth: int) -> Iterator[str]:
    yield f"{type(value).__name__}("
    early = getattr(type(value), "_first", ())
    for name in (*early, *(name for name in value._fields if name not in early)):
        field = getattr(value, name)
        if _is_named(field) and depth > 1 and field._fields:
            first, *rest = _lines(field, depth - 1)
            yield f"  {name}: {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield f"  {name}: {_said(value, name, field)}"
    yield ")"


def _said(value: Any, name: str, field: Any) -> str:
    labels, labelled = getattr(type(value), "_labels", (None, ()))
    if labels is not None and name in labelled:
        return _by_name(_at(value, labels), field)
    say = getattr(type(value), "_words", {}).get(name)
    if say is None or isinstance(field, jax.core.Tracer) or np.ndim(field):
        return short(field)
    return str(say(field))


def _by_name(names: tuple[str, ...], field: Any) -> str:
    """A short vector with a name before each entry."""
    said = short(field)
    if not said.startswith("[") or np.shape(field) != (len(names),):
        return said
    pairs = zip(names, np.asarray(field), strict=True)
    return ", ".join(f"{name} {_number(entry)}" for name, entry in pairs)


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def short(value: Any) -> str:
    """A leaf or a pytree in a line: few numbers themselves, of many the shape and the range.

    >>> short(np.arange(3.0)), short(np.arange(10)), short({"w": np.ones((2, 2)), "b": None})
    ('[0, 1, 2]', 'int64[10], 0 to 9', 'dict of 1 array, 4 entries')
    """
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple) and value and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array(value)
    leaves = [leaf for leaf in jax.tree.leaves(value) if hasattr(leaf, "shape")]
    size = sum(int(np.prod(leaf.shape)) for leaf in leaves)
    many = "array" if len(leaves) == 1 else "arrays"
    return f"{type(value).__name__} of {len(leaves)} {many}, {size} entries"


def _array(value: Any) -> str:
    kind = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    known = not isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    if not known or not getattr(value, "is_fully_addressable", True):
        return kind
    if not jnp.issubdtype(value.dtype, np.number) and value.dtype != bool:
        return kind
    entries = np.asarray(value)
    if entries.ndim == 0:
        return _number(entries[()])
    if entries.ndim in (1, 2) and 0 < entries.size <= FEW:
        return _nested(entries)
    if entries.size == 0 or entries.dtype == bool or np.iscomplexobj(entries):
        return kind + (f", {entries.sum()} true" if entries.dtype == bool else "")
    finite = entries[np.isfinite(entries)]
    found = f", {_number(finite.min())} to {_number(finite.max())}" if finite.size else ""
    lost = entries.size - finite.size
    return kind + found + (f", {lost} not finite" if lost else "")


def _nested(entries: np.ndarray) -> str:
    if entries.ndim == 0:
        return _number(entries[()])
    return f"[{', '.join(map(_nested, entries))}]"


def _number(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return str(value)
    if isinstance(value, np.floating) and value == np.finfo(value.dtype).max:
        return "largest float"
    return f"{value:.6g}"


def _page(value: Any, curve: str | None, bars: str | None) -> str:
    """The fields as a table, and what is drawn of them."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(said)}</td></tr>"
        for name, said in _flat(value).items()
    )
    drawn = "".join(
        _drawing(path, _at(value, path), kind)
        for path, kind in ((curve, "curve"), (bars, "bars"))
        if path is not None
    )
    return f"<b>{type(value).__name__}</b>{drawn}<table>{rows}</table>"


def _flat(value: Any) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, field in zip(value._fields, value, strict=True):
        if _is_named(field) and type(field).__name__.endswith("Info"):
            pairs = zip(field._fields, field, strict=True)
            found |= {f"{name}.{k}": _said(field, k, f) for k, f in pairs}
        else:
            found[name] = _said(value, name, field)
    # what a reader asks for first
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("info.")))


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _drawing(name: str, values: Any, kind: str, width: int = 320, height: int = 80) -> str:
    """A line or bars of a vector in SVG; nothing where there is nothing to see."""
    if isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return ""
    heights = np.asarray(values, float).ravel()
    if kind == "curve":  # the last value is repeated where a run ended early
        heights = heights[: np.max(np.flatnonzero(heights != heights[-1:]), initial=0) + 2]
    if heights.size < 2 or not np.all(np.isfinite(heights)):
        return ""
    if heights.size > width:
        heights = heights[np.linspace(0, heights.size - 1, width).astype(int)]
    low = min(heights.min(), 0.0) if kind == "bars" else heights.min()
    span = heights.max() - low or 1.0
    y = height * (1 - (heights - low) / span)
    if kind == "curve":
        x = np.linspace(0, width, heights.size)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        shape = f"<polyline points='{points}' fill='none' stroke='#0072B2' stroke-width='1.5'/>"
    else:
        wide = width / heights.size
        shape = "".join(
            f"<rect x='{k * wide:.1f}' y='{b:.1f}' width='{0.8 * wide:.1f}' "
            f"height='{height - b:.1f}' fill='#0072B2'/>"
            for k, b in enumerate(y)
        )
    title = f"{html.escape(name)}: {heights[0]:.4g} to {heights[-1]:.4g}"
    if kind == "bars":
        title = f"{html.escape(name)}: at most {heights.max():.4g}"
    return (
        f"<div>{title}<br><svg width='{width}' height='{height + 2}' "
        f"style='max-width:100%'>{shape}</svg></div>"
    )
