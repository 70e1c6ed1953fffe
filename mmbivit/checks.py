"""Checks of single values that users write in a config: one line that names the key and says what is allowed."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = [
    "UserError",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_integers",
    "check_keys",
    "check_number",
    "did_you_mean",
]


class UserError(ValueError):
    """What a user can mend: the message says what was wrong, what was expected and what to do, in one line.

    Tools show it without a traceback; anything else that goes wrong shows where.
    """


def did_you_mean(value: Any, known: Iterable[Any]) -> str:
    """Return ``; did you mean 'x'?``, or nothing where no known name is similar."""
    names = [name for name in known if isinstance(name, str) and name != value]
    close = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else ()
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise a ValueError if a value is not one of those allowed."""
    if any(type(value) is type(choice) and value == choice for choice in allowed):
        return
    raise UserError(
        f"{name}={_show(value)} is unknown; allowed: {', '.join(map(repr, allowed))}{did_you_mean(value, allowed)}"
    )


def check_flag(name: str, value: Any) -> None:
    """Raise a ValueError for anything but ``True`` and ``False``, such as the text ``'False'``, which is true."""
    check_choice(name, value, (True, False))


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise a ValueError if a value is no integer from ``low`` to ``high``, both allowed."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        raise _wrong(
            name, value, f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
        )


def check_integers(name: str, value: Any, low: int, high: int) -> None:
    """Raise a ValueError if a value is no list or tuple, not empty, of integers from ``low`` to ``high``."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise _wrong(name, value, f"a list of integers from {low} to {high}")
    for i, item in enumerate(value):
        check_integer(f"{name}[{i}]", item, low, high)


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False, below: bool = False) -> None:
    """Raise a ValueError if a value is no number in an interval; NaN is in none.

    Args:
        name: the key.
        value: its value.
        low: least value.
        high: greatest value.
        above: ``low`` itself is not allowed.
        below: ``high`` itself is not allowed.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or not low <= value <= high or (above and value == low) or (below and value == high):
        top = "" if high == math.inf and not below else f" and {'<' if below else '<='} {high:g}"
        raise _wrong(name, value, f"a number {'>' if above else '>='} {low:g}{top}")


def check_keys(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Raise a ValueError if a value is no dict, lacks a key or has one that is unknown."""
    allowed = [*required, *optional]
    usage = f"dict({', '.join(f'{key}=' for key in allowed)})"
    if not isinstance(value, Mapping):
        raise _wrong(name, value, usage)
    for key in value:
        if key not in allowed:
            raise UserError(
                f"{name} has no key {_show(key)}; allowed: {', '.join(allowed)}{did_you_mean(key, allowed)}"
            )
    for key in required:
        if key not in value:
            raise UserError(f"{name} lacks the key {key!r}; expected {usage}")


def _wrong(name: str, value: Any, allowed: str) -> ValueError:
    return UserError(f"{name}={_show(value)}; allowed: {allowed}")


def _show(value: Any) -> str:
    """Return a value as one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
