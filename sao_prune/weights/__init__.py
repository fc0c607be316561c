"""What values stand on the edges: orthogonal, mirrored, normal and uniform blocks, and lifts to convolutions."""

from .approximate import ApproximateIsometry, approximate_isometry
from .blocks import Blocks, delta_, normal_blocks, orthogonal_blocks, uniform_blocks
from .eco import eco_blocks, frequencies_from_kernel, kernel_from_frequencies
from .givens import givens_matrix
from .least_squares import BlockFit, kept_blocks
from .mirrored import Mirror, mirror_blocks, mirror_topology
from .orthogonal import haar
from .ridge import refitted

__all__ = [
    "ApproximateIsometry",
    "BlockFit",
    "Blocks",
    "Mirror",
    "approximate_isometry",
    "delta_",
    "eco_blocks",
    "frequencies_from_kernel",
    "givens_matrix",
    "haar",
    "kept_blocks",
    "kernel_from_frequencies",
    "mirror_blocks",
    "mirror_topology",
    "normal_blocks",
    "orthogonal_blocks",
    "refitted",
    "uniform_blocks",
]
