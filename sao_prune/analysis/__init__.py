"""Instruments: is a network connected, is it isometric, and what does it cost to store."""

from .attacks import perturb, pgd, random_search
from .footprint import LayerStorage, Storage, storage
from .graph import (
    RamanujanGap,
    adjacency_eigenvalues,
    component_count,
    components,
    is_connected,
    ramanujan_gap,
    spectrum,
)
from .lipschitz import lipschitz_bound, margin_constants, operator_norm
from .masks import SpectrumTooLargeError
from .meanfield import MeanField, mean_field
from .reach import depth_to_full_reachability, least_depth, reachability
from .robustness import (
    Certificate,
    WorstCase,
    certified_accuracy,
    certified_radii,
    pgd_l2,
    worst_case,
)
from .similarity import KSResult, ks_test
from .spectra import JacobianSpectrum, jacobian_spectrum, singular_values
from .threat import Threat, margins
from .track import IsometryRecord, track_isometry

__all__ = [
    "Certificate",
    "IsometryRecord",
    "JacobianSpectrum",
    "KSResult",
    "LayerStorage",
    "MeanField",
    "RamanujanGap",
    "SpectrumTooLargeError",
    "Storage",
    "Threat",
    "WorstCase",
    "adjacency_eigenvalues",
    "certified_accuracy",
    "certified_radii",
    "component_count",
    "components",
    "depth_to_full_reachability",
    "is_connected",
    "jacobian_spectrum",
    "ks_test",
    "least_depth",
    "lipschitz_bound",
    "margin_constants",
    "margins",
    "mean_field",
    "operator_norm",
    "perturb",
    "pgd",
    "pgd_l2",
    "ramanujan_gap",
    "random_search",
    "reachability",
    "singular_values",
    "spectrum",
    "storage",
    "track_isometry",
    "worst_case",
]
