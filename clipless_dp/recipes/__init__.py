"""What of a network trains, by name: last layers, biases, low-rank adapters, all of it; and batch norms replaced.

Surgery on any ``nn.Module``, done before it is wrapped. Frozen parts need no bound and no noise, so that fewer trained
parameters can mean a better model at the same ε. Each recipe sets ``requires_grad`` of *every* parameter, whatever it
was before, and returns the network.

A pattern names modules or parameters as :mod:`fnmatch` does, ``*`` being anything, dots included. It matches a dotted
name or the end of one behind a dot: ``"query"`` is each ``….attention.self.query``. Who names a module means all that
is in it. A pattern that matches nothing is refused.
"""

from clipless_dp.recipes.adapters import LoRALinear, lora, merge_lora
from clipless_dp.recipes.naming import HEADS, Patterns
from clipless_dp.recipes.normalisation import FrozenBatchNorm, convert_batchnorm
from clipless_dp.recipes.selection import biases_only, freeze, full, last_layers, only

__all__ = [
    "HEADS",
    "FrozenBatchNorm",
    "LoRALinear",
    "Patterns",
    "biases_only",
    "convert_batchnorm",
    "freeze",
    "full",
    "last_layers",
    "lora",
    "merge_lora",
    "only",
]
