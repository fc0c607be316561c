"""Sets of images or sequences: found, fetched or drawn, verified, held whole on the device, and augmented there."""

from .dataset import Dataset
from .load import load_dataset
from .source import DataSource
from .spec import DataSpec, dataset_names
from .split import stratified_split, stratified_subset

__all__ = [
    "DataSource",
    "DataSpec",
    "Dataset",
    "dataset_names",
    "load_dataset",
    "stratified_split",
    "stratified_subset",
]
