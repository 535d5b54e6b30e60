"""Facts and tables in plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_DEEPEST = 40


def print_title(title: str, facts: Mapping[str, Any]) -> None:
    """Print a title and named facts under it; empty ones are left out."""
    print(title)
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value is not None and value != "":
            print(f"  {name:<{width}}  {value}")


def print_values(title: str, values: Mapping[str, Any]) -> None:
    """Print named values under a title, if there are any."""
    if values:
        print(f"\n  {title}")
        width = max(len(name) for name in values)
        for name, value in values.items():
            print(f"    {name:<{width}}  {brief(value)}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print(f"\n  {title}" if title else "")
    for row in (head, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())


def flat(value: Mapping[str, Any], name: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values under dotted names."""
    for key, inner in value.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(inner, Mapping):
            yield from flat(inner, path)
        else:
            yield path, inner


def brief(value: Any) -> Any:
    """A value in few characters; of a long list only its length."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {brief(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        text = ", ".join(str(brief(inner)) for inner in value)
        return text if len(text) <= _DEEPEST else f"{len(value)} values"
    return value


def number(value: float | None) -> str:
    """A number with four digits; a dash for None."""
    return "-" if value is None else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share in percent, with three digits; a dash for None."""
    return "-" if share is None else f"{100 * share:.3g}%"


def numbers(values: Iterable[float]) -> str:
    """Numbers in a line; of many the first and the last."""
    texts = [f"{value:.3g}" for value in values]
    return " ".join(texts if len(texts) <= 8 else [*texts[:3], "...", *texts[-2:]])


def some(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
