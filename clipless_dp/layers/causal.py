"""Causal mixing of tokens by sparse triangular matrices that do not depend on the tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clipless_dp.arguments import choice, positive, whole
from clipless_dp.errors import ConfigurationError
from clipless_dp.modules import Unscripted
from clipless_dp.norms.operators import TriangularOperator

Pattern = Literal["powers", "squares", "full"]


class CausalMixing(Unscripted, nn.Module):
    """``Y = (I - B)⁻¹AX`` along the tokens, with sparse lower triangular ``A`` and ``B`` of constant entries.

    ``A`` reads tokens some steps back, ``B`` feeds outputs back to later ones: ``y_i = Σ_j A_ij x_j + Σ_j B_ij y_j``.
    So each token hears all tokens before it, on ways through few others, by ``O(T log T)`` or ``O(T√T)`` numbers
    (Fagnou, Caillon, Delattre and Allauzen, "Chain and causal attention for efficient entity tracking", EMNLP 2024,
    whose matrices are attention: of the tokens themselves, and so without a Lipschitz constant). The steps are

    * ``"powers"``: ``i - j = 1, 2, 4, 8, …``;
    * ``"squares"``: ``i - j = 1, 2, 5, 10, …``, one more than squares;
    * ``"full"``: all, ``O(T²)`` numbers;

    and 0 as well in ``A``. Proofs: docs/bounds.md, "Causal mixing".

    Args:
        tokens: ``T``, a public number, at least 2.
        pattern: which steps there are.
        feedback_limit: ``β``, in (0, 1): a constraint with limit 1 holds ``‖B‖ ≤ β``, one with limit ``c``
            ``‖B‖ ≤ cβ``; of ``A`` the limit is ``α`` itself. So ``K ≤ α/(1 - β)``.

    Attributes:
        weight: the entries of ``A``, diagonal by diagonal from the main one down; at first about the identity.
        feedback: those of ``B``, from the first below; at first of norm ``β``.
        steps: the steps of ``B``.

    Shape:
        ``(B, T, C)`` to the same shape.

    Raises:
        ConfigurationError: there is no such pattern, ``T`` is not at least 2 or ``β`` not in (0, 1); or an input has
            another number of tokens.

    Cost:
        ``log₂ T`` products of ``T × T`` matrices a pass, and one with the tokens.
    """

    def __init__(self, tokens: int, pattern: Pattern = "powers", *, feedback_limit: float = 0.5) -> None:
        super().__init__()
        self.tokens = whole("tokens", tokens, 2)
        self.pattern: Pattern = choice("pattern", pattern, *get_args(Pattern))
        self.feedback_limit = positive("feedback_limit", feedback_limit)
        if self.feedback_limit >= 1.0:
            raise ConfigurationError(
                f"feedback_limit must be below 1, where what is fed back dies away, got {feedback_limit!r}"
            )
        self.steps = tuple(step for step in _steps(self.tokens, self.pattern) if step < self.tokens)
        self.weight = nn.Parameter(torch.empty(self.operator().entries))
        self.feedback = nn.Parameter(torch.empty(self.feedback_operator().entries))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the entries anew: ``A`` near the identity, so that tokens come through, ``B`` of any signs."""
        nn.init.normal_(self.weight, std=0.1)
        self.weight[: self.tokens] += 1.0
        nn.init.normal_(self.feedback)
        for values, operator in ((self.weight, self.operator()), (self.feedback, self.feedback_operator())):
            norm = operator.norm(values)
            if norm > 0.0:
                values.div_(norm)

    def operator(self) -> TriangularOperator:
        """What ``weight`` acts as: ``A``."""
        return TriangularOperator(self.tokens, (0, *self.steps))

    def feedback_operator(self) -> TriangularOperator:
        """What ``feedback`` acts as: ``B/β``."""
        return TriangularOperator(self.tokens, self.steps, self.feedback_limit)

    def matrix(self) -> Tensor:
        """``(I - B)⁻¹A``, ``(T, T)``: since ``B^T = 0``, the inverse is ``(I + B)(I + B²)(I + B⁴)…``."""
        mixed = self.operator().dense(self.weight)
        power = self.feedback_operator().dense(self.feedback)
        reached = 1
        while reached < self.tokens:
            mixed = mixed + power @ mixed
            reached *= 2
            if reached < self.tokens:
                power = power @ power
        return mixed

    def forward(self, values: Tensor) -> Tensor:
        """Mixes the tokens."""
        if values.dim() != 3 or values.shape[1] != self.tokens:
            raise ConfigurationError(f"expected (B, {self.tokens}, C), got {tuple(values.shape)}")
        return torch.matmul(self.matrix(), values)

    def extra_repr(self) -> str:
        """Tokens, pattern and limit."""
        return f"tokens={self.tokens}, pattern={self.pattern!r}, feedback_limit={self.feedback_limit:g}"


def _steps(tokens: int, pattern: Pattern) -> list[int]:
    if pattern == "powers":
        return [2**power for power in range(tokens.bit_length())]
    if pattern == "squares":
        return [root * root + 1 for root in range(tokens)]
    return [*range(1, tokens)]
