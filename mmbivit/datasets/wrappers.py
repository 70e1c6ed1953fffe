"""Data sets inside others."""

from typing import Any

__all__ = ["inner_dataset"]


def inner_dataset(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the data set inside wrappers such as ``RepeatDataset``."""
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset
