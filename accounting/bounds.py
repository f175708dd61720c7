"""The result of a privacy computation."""

from __future__ import annotations

import decimal

__all__ = ["PrivacyBound", "rounded_down", "rounded_up"]


def rounded_up(value: float) -> str:
    """Six digits, never below the value."""
    text = f"{value:.6g}"
    return text if float(text) >= value else f"{value * (1.0 + 5e-6):.6g}"


def rounded_down(value: float) -> str:
    """Six digits, never above the value."""
    return f"{decimal.Context(prec=6, rounding=decimal.ROUND_FLOOR).create_decimal(repr(float(value))):g}"


class PrivacyBound(float):
    """An interval that certainly holds the tight ε (or δ); as a float it is the upper end.

    Being a float it can be compared, formatted and stored as one.

    Attributes:
        lower: Certified lower bound of the tight value; 0 when the engine has none.
        upper: Certified upper bound: what a guarantee may state.
        delta: The δ that the value belongs to (for an ε), or the ε that was asked (for a δ).
        relation: Neighbouring relation, `"add_or_remove_one"` or `"replace_one"`.
        sampling: How batches were formed, as read from the ledger.
        engine: Which engine answered.
        group_size: How many rows a person has at most whom the value is about; or how many people, where the ledger
            is about people.
        unit: What the ledger is about: `"person"`, or, empty, a row.
    """

    lower: float
    upper: float
    delta: float
    relation: str
    sampling: str
    engine: str
    group_size: int
    unit: str

    def __new__(
        cls,
        upper: float,
        *,
        lower: float = 0.0,
        delta: float = 0.0,
        relation: str = "add_or_remove_one",
        sampling: str = "unknown",
        engine: str = "unknown",
        group_size: int = 1,
        unit: str = "",
    ) -> PrivacyBound:
        """Makes a bound whose float value is `upper`."""
        self = super().__new__(cls, upper)
        self.upper = float(upper)
        self.lower = min(float(lower), self.upper)
        self.delta = delta
        self.relation = relation
        self.sampling = sampling
        self.engine = engine
        self.group_size = group_size
        self.unit = unit
        return self

    @property
    def whom(self) -> str:
        """Who is promised this, in words."""
        if self.unit == "person":
            return "a person" if self.group_size == 1 else f"{self.group_size} people together"
        return "a person with " + ("one row" if self.group_size == 1 else f"up to {self.group_size} rows")

    def __repr__(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size > 1 else ""
        group += f", unit={self.unit!r}" if self.unit else ""
        return (
            f"PrivacyBound({self.lower:.6g} <= {self.upper:.6g}, delta={self.delta:g}, "
            f"relation={self.relation!r}, sampling={self.sampling!r}, engine={self.engine!r}{group})"
        )

    def __getnewargs_ex__(self) -> tuple[tuple[float], dict[str, object]]:
        fields = ("lower", "delta", "relation", "sampling", "engine", "group_size", "unit")
        return (self.upper,), {name: getattr(self, name) for name in fields}
