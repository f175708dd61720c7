"""Features of photographs from a dictionary of image patches, all of them synthetic: no data entered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from clipless_dp.arguments import not_negative, positive, whole
from clipless_dp.errors import ConfigurationError, InputError
from clipless_dp.features import leaves
from clipless_dp.features.leaves import dead_leaves
from clipless_dp.features.recipes import Recipe

VERSION: Final = f"patches 1, {leaves.VERSION}"
"""Of how the dictionary is made and used."""

_PATCHES = 25
"""Random patches of each image, on average, that the whitening comes from; their mirror images come on top."""

_PLACES_AT_ONCE = 1024
_ATOMS_AT_ONCE = 256
"""Maps that are computed at once, of about so many places: larger ones are not in a processor's cache."""

_MARGIN = 1.0 + 1e-5
"""Rounding of filters to float32, in the constant that is stated."""


class PatchDictionary(Recipe):
    """What patches of a dictionary are like at each place, averaged over ``3×3`` windows, of an image and its mirror.

    A single layer of patches (Coates, Ng and Lee 2011, "An analysis of single-layer networks in unsupervised feature
    learning"; random patches as atoms: Coates and Ng 2011, §3), with synthetic patches in place of the data's. A patch
    ``p``, all channels of ``s×s`` pixels, is standardised, whitened, and compared with ``K`` atoms::

        q = (p - mean p)/√(var p + c²),    z = Dᵀ·W·(q - m),    a = (max(z - t, 0), max(-z - t, 0))

    with ``m`` and ``W = (Cov q + ρ·I)^(-1/2)`` of random patches, 25 for each of the :func:`dead_leaves` images, and
    their mirror images. The atoms ``D`` are ``K/2`` of these patches, those of at least half the median norm, whitened
    and scaled to unit norm, and their mirror images. ``a`` is computed at all places and averaged over the windows;
    what the mirror image has is added, and the square root of each number taken, as averages are skewed. An image and
    its mirror image have the same features, so half of them are left out: ``K/2`` atoms, two signs, nine windows.

    No data enters: the features of an image cost no privacy, and depend on no other image.

    Args:
        image_size: height and width.
        channels: 3, or 1 for grey images.
        atoms: ``K``, even.
        patch_size: ``s``, at least 2.
        windows: along each axis; they overlap by one place where their number does not divide that of the places.
        threshold: ``t``.
        contrast: ``c``: patches of less contrast than this are amplified no further; of pixels in [0, 1].
        regularisation: ``ρ``.
        images: how many synthetic images the patches are from.
        seed: of the images and of the choice among their patches; public.
        root: whether the square root is taken.
        state: ``state_dict()`` of one that was made with the same arguments: nothing is drawn then.
        progress: whether a bar is shown at a terminal while images are drawn.

    Shape:
        ``(B, C, H, W)``, pixels in [0, 1], to ``(B, K·windows²)``: number ``(u·K/2 + k)·windows² + w`` is that of sign
        ``u``, atom ``k`` and window ``w``, row by row.

    Raises:
        ConfigurationError: an argument is out of range, the image holds too few patches, or the synthetic images too
            few of enough contrast.
        InputError: the images have another shape, or are not floating-point numbers.
        CheckpointError: the state is of another recipe or of other arguments, has numbers that are not finite, or does
            not fit.

    Attributes:
        lipschitz: ``L`` with ``‖f(x) - f(y)‖ ≤ L·‖x - y‖`` for all images. **With the square root there is none**, and
            this is infinite: its slope at 0, where a patch is like no atom, is. Without it, see below; it is large, and
            certificates of images through it are small.

    Why ``L`` bounds it, without the square root:
        Centring a patch is a projection. Of the centred patch ``u`` with ``n`` entries, ``u/√(‖u‖²/(n-1) + c²)`` has a
        Jacobian with the eigenvalues ``1/√(‖u‖²/(n-1) + c²)`` across ``u`` and ``c²/(‖u‖²/(n-1) + c²)^(3/2)`` along it,
        neither above ``1/c``. A pixel is in at most ``s²`` patches, so that all patches together differ by at most
        ``s·‖x - y‖``. What follows is linear, of norm ``‖DᵀW‖`` at each place. The two sides of the threshold together
        expand no distance: of ``z`` and ``z'`` of one sign one side is 0 at both, and of two signs
        ``‖a - a'‖ ≤ |a|₁ + |a'|₁ ≤ |z - z'|``. Averages over windows are a matrix along each axis, ``R`` and ``R'``:
        together of norm ``‖R‖·‖R'‖``. What the mirror image has are the numbers of the other half of the atoms: two
        halves of one vector are added, ``√2``. In all ``L = (s/c)·‖DᵀW‖·‖R‖·‖R'‖·√2``.
    """

    filters: Tensor
    offsets: Tensor

    def __init__(
        self,
        image_size: tuple[int, int],
        channels: int = 3,
        *,
        atoms: int = 512,
        patch_size: int = 6,
        windows: int = 3,
        threshold: float = 0.6,
        contrast: float = 10.0 / 255.0,
        regularisation: float = 0.1,
        images: int = 4000,
        seed: int = 0,
        root: bool = True,
        state: Mapping[str, Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(VERSION)
        height, width = (whole("image_size", size) for size in image_size)
        atoms, patch_size, windows = (
            whole("atoms", atoms, 2),
            whole("patch_size", patch_size, 2),
            whole("windows", windows),
        )
        if atoms % 2:
            raise ConfigurationError(f"atoms come with their mirror images: atoms must be even, got {atoms}")
        self.places = (height - patch_size + 1, width - patch_size + 1)
        if min(self.places) < windows:
            raise ConfigurationError(
                f"images of {height}×{width} have too few patches of {patch_size}×{patch_size} pixels for "
                f"{windows}×{windows} windows"
            )
        self.image_size, self.channels, self.atoms = (height, width), channels, atoms
        self.patch_size, self.windows, self.root = patch_size, windows, bool(root)
        self.threshold = not_negative("threshold", threshold)
        self.contrast, self.regularisation = positive("contrast", contrast), positive("regularisation", regularisation)
        self.images, self.seed = whole("images", images), whole("seed", seed, 0)
        self._made_of(
            image_size=self.image_size, channels=int(channels), atoms=atoms, patch_size=patch_size, windows=windows,
            threshold=self.threshold, contrast=self.contrast, regularisation=self.regularisation, images=self.images,
            seed=self.seed, root=self.root,
        )  # fmt: skip
        if state is None:
            drawn = dead_leaves(self.images, self.image_size, channels, seed=self.seed, progress=progress)
            filters, offsets = self._dictionary(drawn.float().div_(255.0))
        else:
            filters, offsets = torch.empty(atoms, channels, patch_size, patch_size), torch.empty(atoms)
        self.register_buffer("filters", filters)
        self.register_buffer("offsets", offsets)
        if state is not None:
            self._filled(state)

    def _dictionary(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Filters ``(K, C, s, s)`` on a patch, in place of its standardisation, and what they lose for its mean."""
        generator = torch.Generator().manual_seed(self.seed)
        size, count = self.patch_size, _PATCHES * len(images)
        number, down, right = (
            torch.randint(high, (count,), generator=generator) for high in (len(images), *self.places)
        )
        patches = images.unfold(2, size, 1).unfold(3, size, 1)[number, :, down, right]
        standard = self._standardised(torch.cat([patches, patches.flip(-1)])).double()
        mean = standard.mean(0)
        standard -= mean
        covariance = standard.T @ standard / len(standard)
        values, vectors = torch.linalg.eigh(covariance)
        whitening = vectors * (values.clamp(min=0.0) + self.regularisation).rsqrt() @ vectors.T
        candidates = standard[:count] @ whitening
        lengths = candidates.norm(dim=1)
        chosen = candidates[lengths > 0.5 * lengths.median()][: self.atoms // 2]
        if len(chosen) < self.atoms // 2:
            raise ConfigurationError(f"only {len(chosen)} patches for {self.atoms // 2} atoms: ask for fewer")
        filters = functional.normalize(chosen) @ whitening
        # Of the mirror images, exactly.
        filters = filters.unflatten(1, (self.channels, size, size))
        filters = torch.cat([filters, filters.flip(-1)])
        mean = mean.view(self.channels, size, size)
        offsets = (filters * (0.5 * (mean + mean.flip(-1)))).sum((1, 2, 3))
        # Centring first comes to the same: a patch's mean times the filter's sum.
        return (filters - filters.mean((1, 2, 3), keepdim=True)).float(), offsets.float()

    def _standardised(self, patches: Tensor) -> Tensor:
        """``(n, C, s, s)`` to ``q``, ``(n, C·s²)``."""
        rows = patches.flatten(1)
        variances, means = torch.var_mean(rows, 1, keepdim=True)
        return (rows - means) * (variances + self.contrast**2).rsqrt()

    @property
    def lipschitz(self) -> float:
        """See the class: of the filters as they are now."""
        if self.root:
            return math.inf
        norm = float(torch.linalg.matrix_norm(self.filters.double().flatten(1), 2))
        rows, columns = (float(torch.linalg.matrix_norm(_averages(size, self.windows), 2)) for size in self.places)
        return self.patch_size / self.contrast * norm * rows * columns * math.sqrt(2.0) * _MARGIN

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        wanted = (self.channels, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted or not images.is_floating_point():
            raise InputError(
                f"expected floating-point images (batch, {', '.join(map(str, wanted))}) with pixels in [0, 1], got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        if len(images) == 0:
            return images.new_zeros(0, self.atoms * self.windows**2)
        averages = torch.kron(*(_averages(size, self.windows) for size in self.places)).to(images)
        at_once = max(1, _PLACES_AT_ONCE // averages.shape[1])
        return torch.cat([self._features(some, averages) for some in images.split(at_once)])

    def _features(self, images: Tensor, averages: Tensor) -> Tensor:
        filters, offsets = (part.to(images.dtype) for part in (self.filters.flatten(1), self.offsets))
        size, entries, places = self.patch_size, self.channels * self.patch_size**2, averages.shape[1]
        # Of squares about one half, of which less is lost to rounding.
        centred = images - 0.5
        means, squares = (
            functional.avg_pool2d(some.mean(1, keepdim=True), size, 1) for some in (centred, centred.square())
        )
        variances = (squares - means.square()).clamp(min=0.0) * (entries / (entries - 1))
        patches = centred.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, entries)
        patches = patches * (variances + self.contrast**2).rsqrt().view(-1, 1)
        maps = []
        for some, lost in zip(filters.split(_ATOMS_AT_ONCE), offsets.split(_ATOMS_AT_ONCE), strict=True):
            # Products of matrices take a third of the time of a convolution and adaptive averages, on a processor.
            alike = torch.addmm(lost, patches, some.T, beta=-1.0).view(len(images), places, -1)
            signs = [(alike - self.threshold).relu_(), (-self.threshold - alike).relu_()]
            maps.append(torch.stack([averages @ sign for sign in signs], 1))
        # (B, signs, an atom or its mirror image, K/2, windows, windows)
        pooled = torch.cat(maps, 3).transpose(2, 3).unflatten(2, (2, -1)).unflatten(-1, (self.windows, self.windows))
        both: Tensor = (pooled[:, :, 0] + pooled[:, :, 1].flip(-1)).flatten(1)
        return both.sqrt() if self.root else both

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"image_size={self.image_size}, channels={self.channels}, atoms={self.atoms}, "
            f"patch_size={self.patch_size}, windows={self.windows}, images={self.images}, seed={self.seed}, "
            f"root={self.root}"
        )


def _averages(places: int, windows: int) -> Tensor:
    """``(windows, places)``: what averages over adaptive windows do along an axis."""
    return functional.adaptive_avg_pool1d(torch.eye(places, dtype=torch.float64)[:, None], windows)[:, 0].T
