"""Mutants: the library with one line changed, to show that the attacks notice."""

from __future__ import annotations

import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from clipless_dp.rules import base


@dataclass(frozen=True)
class Mutant:
    """One change of one function's source.

    Attributes:
        name: the mistake.
        owner: module or class that holds the function.
        function: its name.
        old: text that occurs exactly once in it.
        new: what stands there in the mutant.
    """

    name: str
    owner: Any
    function: str
    old: str
    new: str

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts the mutant in place until the test ends; rules are registered anew, in a copy of the registry."""
        original = inspect.getattr_static(self.owner, self.function)
        source = textwrap.dedent(inspect.getsource(getattr(original, "__func__", original)))
        assert source.count(self.old) == 1, f"{self.name}: {self.old!r} does not occur once in {self.function}"
        module = sys.modules[inspect.unwrap(getattr(original, "__func__", original)).__module__]
        monkeypatch.setattr(base, "_RULES", dict(base._RULES))
        monkeypatch.setattr(base, "_FUNCTION_RULES", dict(base._FUNCTION_RULES))
        names: dict[str, Any] = {}
        code = compile(f"from __future__ import annotations\n{source.replace(self.old, self.new)}", "<mutant>", "exec")
        exec(code, module.__dict__, names)
        monkeypatch.setattr(self.owner, self.function, names[self.function])


def with_each(*mutants: Mutant) -> pytest.MarkDecorator:
    """Runs a test with each as ``mutant``, in its name too."""
    return pytest.mark.parametrize("mutant", mutants, ids=lambda mutant: mutant.name)
