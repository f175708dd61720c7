"""What a rule is, and the registry of rules.

A rule says, for one layer type, how far the layer can stretch its input (``Y``), its cotangent (``K``), and how
large the per-sample gradient of each of its parameters can be per unit of cotangent (``Δ_θ/G``).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import nn

from clipless_dp.errors import Unsupported
from clipless_dp.modules import kind_of
from clipless_dp.norms.operators import Operator

LARGEST = 1e30
"""Bounds above this could overflow float32 activations into NaN, which only a ball or sphere gate stops."""

Deferred = float | Callable[[], float]
"""A number, or a function that computes it when (and only if) the tracker needs it."""


def value_of(deferred: Deferred) -> float:
    """Evaluates a :data:`Deferred`."""
    return float(deferred()) if callable(deferred) else float(deferred)


class RuleContext(Protocol):
    """What a rule may ask the tracker. Shapes never include the batch axis."""

    path: str
    kind: str
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first input."""
        ...

    @property
    def input_norm(self) -> float:
        """``X``: bound on the norm of the first input."""
        ...

    def input_norms(self) -> tuple[float, ...]:
        """The bounds of all inputs."""
        ...

    @property
    def input_norm_inf(self) -> float:
        """Bound on the size of the largest entry of any input."""
        ...

    @property
    def free_input_norm(self) -> float:
        """``X`` if it follows without reading a weight, else infinity: lets a gate skip costly certificates."""
        ...

    def norm(self, parameter: str, operator: Operator) -> float:
        """Certified norm of a parameter of this layer: its constraint's limit, or computed from its value."""
        ...


@dataclass(frozen=True)
class LayerBounds:
    """The bounds of one layer; each number may be deferred.

    Attributes:
        output_norm: ``Y``, given the context's input norms.
        lipschitz: ``K``; one number, or one for each input.
        gradients: for each parameter, its per-sample gradient bound *per unit of cotangent norm*.
        cotangent_cap: cap on the cotangent that leaves the layer's input side (a cotangent gate).
        gradient_limits: caps on parameters' per-sample gradients themselves (gradient gates).
        gradient_stretches: the most by which such a gate may enlarge a small gradient, for those parameters of which it
            is known: 1 where the gate clips. Where it is not said, the cap alone bounds the gradient.
        joint_limits: caps on the per-sample gradients of several parameters together, one for each use: names, and the
            cap. They speak for all gradients of these parameters, in place of the others.
        counted: how often each gate whose cap adapts counts a sample, a half at most each time.
        operators: the operator each parameter acts as, for constraints.
        coverage: for windows, the coverage ``N``; reported only.
        kinds: where each parameter has a line of its own in the report: what it says of it.
        lipschitz_inf: ``K_∞``, the same as ``lipschitz`` in the maximum norm, in which ``‖J‖`` is the largest ℓ1 norm
            of a row: by so much the cotangent's ℓ1 norm may grow. ``None`` where it is not known.
        output_norm_inf: bound on the size of the output's largest entry, given the context's; ``None``: ``Y`` is one.
    """

    output_norm: Deferred
    lipschitz: Deferred | Sequence[Deferred] = 1.0
    gradients: Mapping[str, Deferred] = field(default_factory=dict)
    cotangent_cap: float = math.inf
    gradient_limits: Mapping[str, float] = field(default_factory=dict)
    gradient_stretches: Mapping[str, float] = field(default_factory=dict)
    joint_limits: Sequence[tuple[tuple[str, ...], float]] = ()
    counted: Mapping[str, int] = field(default_factory=dict)
    operators: Mapping[str, Operator] = field(default_factory=dict)
    coverage: int | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)
    lipschitz_inf: Deferred | Sequence[Deferred] | None = None
    output_norm_inf: Deferred | None = None


class RuleError(Exception):
    """Raised inside a rule to refuse a configuration; the tracker turns it into an ``UnsupportedModuleError``."""


Rule = Callable[[Any, RuleContext], LayerBounds]
FunctionRule = Callable[[RuleContext, tuple[Any, ...], dict[str, Any]], LayerBounds]
RuleT = TypeVar("RuleT", bound=Rule)
FunctionRuleT = TypeVar("FunctionRuleT", bound=FunctionRule)

_RULES: dict[type[nn.Module], Rule] = {}
_FUNCTION_RULES: dict[Any, FunctionRule] = {}
_REMEDIES: dict[type[Any], str] = {}


def register_rule(*module_types: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Registers the decorated function as the rule of the given module types (exact types, not subclasses).

    The function takes the module and a :class:`RuleContext` and returns :class:`LayerBounds`. Every parameter of
    the module must appear in ``gradients``. The bounds must hold for *every* input of norm at most
    ``context.input_norm``, and the module must not mix samples.

    Example:
        >>> @register_rule(Scale)                                   # doctest: +SKIP
        ... def scale_rule(module, context):
        ...     return LayerBounds(
        ...         output_norm=abs(module.factor) * context.input_norm,
        ...         lipschitz=abs(module.factor),
        ...     )

    Raises:
        TypeError: an argument is not a subclass of ``torch.nn.Module``.
    """
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(f"register_rule takes torch.nn.Module types, got {module_type!r}")

    def decorate(rule: RuleT) -> RuleT:
        for module_type in module_types:
            _RULES[module_type] = rule
        return rule

    return decorate


_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
"""What torch takes for its own names, for the sake of numpy's."""


@dataclass(frozen=True)
class _Called:
    """A function rule that is given the arguments of a call by their names, and sees no call with any others."""

    rule: FunctionRule
    calls: tuple[inspect.Signature, ...]

    def __call__(self, context: RuleContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerBounds:
        bound = self.bound(args, kwargs)
        if bound is None:
            known = " or ".join(map(str, self.calls))
            raise RuleError(f"it is called with arguments that its bound does not cover: only {known} has one")
        return self.rule(context, (), bound)

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by their names, defaults included; ``None`` for a call of no known signature."""
        named = {_OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}
        for call in self.calls:
            try:
                bound = call.bind(*args, **named)
            except TypeError:
                continue
            bound.apply_defaults()
            return dict(bound.arguments)
        return None


def register_function_rule(
    *targets: Any, call: Callable[..., object] | Sequence[Callable[..., object]] | None = None
) -> Callable[[FunctionRuleT], FunctionRuleT]:
    """Registers the rule of functions (``torch.relu``) or of tensor methods, by name (``"relu"``).

    Args:
        targets: functions and names; of a method's call the tensor itself is the first argument.
        call: a function, or several, with the parameters that the rule knows of; what it returns is of no account. The
            rule is then given all arguments by name, defaults included, in ``kwargs``, and calls that fit no such
            signature are refused. Without it the rule is given arguments as they were written, and must look at all of
            them: torch has positional factors, ``torch.add(a, 30, b)``, and others that change what is computed.

    Example:
        >>> @register_function_rule(torch.square, "square", call=lambda input: None)        # doctest: +SKIP
        ... def square_rule(context, args, kwargs):
        ...     return LayerBounds(
        ...         output_norm=lambda: context.input_norm**2,
        ...         lipschitz=lambda: 2.0 * context.input_norm,
        ...     )
    """
    calls = () if call is None else (call,) if callable(call) else tuple(call)
    signatures = tuple(inspect.signature(known) for known in calls)

    def decorate(rule: FunctionRuleT) -> FunctionRuleT:
        for target in targets:
            _FUNCTION_RULES[target] = _Called(rule, signatures) if signatures else rule
        return rule

    return decorate


def register_remedy(remedy: str, *module_types: type[Any]) -> None:
    """Says what to use in place of module types that have no bound."""
    for module_type in module_types:
        _REMEDIES[module_type] = remedy


def find_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's exact type: a subclass may compute something else and needs its own."""
    return _RULES.get(kind_of(module))


def find_function_rule(target: Any) -> FunctionRule | None:
    """The rule of a function or of a method's name."""
    return _FUNCTION_RULES.get(getattr(target, "stands_for", target))


def named_arguments(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """A call's arguments as the rule of its function reads them: by name, defaults included, however it is written.

    Returns:
        The arguments; ``None`` where the rule knows no such call, or is a user's own that reads calls as written.
    """
    rule = find_function_rule(target)
    return rule.bound(args, kwargs) if isinstance(rule, _Called) else None


def is_builtin(rule: Rule | FunctionRule) -> bool:
    """Whether a rule is this package's own: it reads weights through its context only, and nothing else that changes.

    What a function says of its module is not enough: ``functools.wraps`` copies it.
    """
    own: Any = rule.rule if isinstance(rule, _Called) else rule
    name = getattr(own, "__module__", None) or ""
    at_home = getattr(own, "__globals__", None) is vars(sys.modules.get(name, math))
    return at_home and name.partition(".")[0] == "clipless_dp"


def unsupported_module(path: str, module: nn.Module) -> Unsupported:
    """The refusal of a module, with its remedy."""
    remedy = next(
        (text for kind, text in _REMEDIES.items() if isinstance(module, kind)),
        "write it from supported parts, or register a rule for it with @register_rule; behind gradient gates, "
        "clipless_dp.gradient_gated(net), it runs as it is",
    )
    return Unsupported(path, type(module).__name__, remedy)
