"""Datasets as probes: read in their own order, the same at every reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from sonde.exceptions import InvalidInputError
from sonde.hooks.model.random_states import RandomStates


class DatasetRows:
    """The examples of a dataset, by position.

    Args:
        source: A dataset of (inputs, targets), or of inputs; or a DataLoader, of which the dataset,
            its `collate_fn` and batch size are taken, not its sampler.

    Attributes:
        num_examples: Their number.
        ids: Where they lie in the dataset that a `Subset` is of; otherwise None.
        batch_size: The batch size of the DataLoader, or None.

    Raises:
        InvalidInputError: If it has no fixed order, or no example.
    """

    def __init__(self, source: Dataset[Any] | DataLoader[Any]) -> None:
        loader = source if isinstance(source, DataLoader) else None
        dataset = cast("Dataset[Any]", loader.dataset if loader is not None else source)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InvalidInputError(
                f"{type(dataset).__name__} has no fixed order; give the probe tensors, or a "
                "dataset with __len__ and __getitem__"
            )
        self._dataset = dataset
        self._collate = loader.collate_fn if loader is not None else default_collate
        self.num_examples = len(dataset)
        self.ids: Sequence[int] | None = None
        if isinstance(dataset, Subset):
            self.ids = list(dataset.indices)
        self.batch_size = loader.batch_size if loader is not None else None
        if not self.num_examples:
            raise InvalidInputError(f"{type(dataset).__name__} has no example")

    def read(self, rows: slice) -> tuple[Any, Any]:
        """Return (inputs, targets) of some examples; targets are None where there are none.

        Each example is read with a seed of its own: one that is augmented at random is the same
        whenever it is read, and the training does not notice what was drawn.
        """
        random_states = RandomStates()
        items = []
        try:
            for position in range(*rows.indices(self.num_examples)):
                random_states.seed(position)
                items.append(self._dataset[position])
        finally:
            random_states.restore()
        batch = self._collate(items)
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0], batch[1]
        return batch, None
