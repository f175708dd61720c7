"""What ``functools.lru_cache`` and ``functools.cache`` hold of earlier calls."""

from __future__ import annotations

import functools
import gc
from typing import Any

CACHES = functools._lru_cache_wrapper
"""The type of functions whose results are kept."""


class Entry(int):
    """The place of a result in a cache: a number that is the same for one key as long as a process lives."""


def results(function: Any) -> list[tuple[Any, Any]]:
    """Keys and results that a function keeps, in the order of their first calls.

    The type is written in C and shows neither; both are what its garbage collection visits, a result behind its key.
    """
    visited = gc.get_referents(function)
    own = vars(function)
    kept = next((value for value in visited if type(value) is dict and value is not own), {})
    if function.cache_parameters()["maxsize"] is None:
        return [*kept.items()]
    keys = {id(key) for key in kept}
    found: dict[int, Any] = {}
    place = 0
    # What lies before the mapping are links: a key, its result, and in some versions of Python their type.
    while place < len(visited) and visited[place] is not kept:
        if id(visited[place]) in keys and place + 1 < len(visited):
            found[id(visited[place])] = visited[place + 1]
            place += 1
        place += 1
    return [(key, found.get(id(key))) for key in kept]


def entry(key: Any) -> Entry:
    """Where the result of a key is."""
    if type(key) is tuple:
        return Entry(hash(tuple(map(entry, key))))
    # -1 and -2 have one hash.
    return Entry(hash(repr(key)) if type(key) is int else hash(key))


def arguments(function: Any, key: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, by place and by name, of which a function has made a key: CPython's ``functools._make_key``."""
    if type(key) is not tuple:
        return (key,), {}
    mark = next((place for place, part in enumerate(key) if type(part) is object), None)
    typed = function.cache_parameters()["typed"]
    if mark is None:
        return (key[: len(key) // 2] if typed else key), {}
    named = key[mark + 1 :]
    count = (len(named) - mark) // 3 if typed else len(named) // 2
    return key[:mark], {named[2 * place]: named[2 * place + 1] for place in range(count)}
