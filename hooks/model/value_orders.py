"""Value orders: whether a forward pass has taken rows of examples in an order that values tell.

A few examples do not speak for others where a model sorts or selects rows, such as the tokens that
an expert takes or the regions of an image that are kept: two rows of each of them may be one of the
next and three of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .taps import tensor_leaves

# What takes rows of an argument elsewhere, and what puts some there.
_MOVING = frozenset(
    [
        *("index", "index_select", "gather", "masked_select", "take", "sort", "topk", "nonzero"),
        *("index_put", "index_put_", "_index_put_impl_", "index_add", "index_add_", "index_copy"),
        *("index_copy_", "scatter", "scatter_", "scatter_add", "scatter_add_", "masked_scatter"),
        *("masked_scatter_",),
    ]
)
_INDICES = frozenset(["index", "indices"])


class ValueOrders(TorchDispatchMode):
    """Notes, while it is entered, whether rows of examples were sorted, selected or put by index.

    What is looked up in a table by the examples, such as an embedding, keeps their order.

    Args:
        given: What the model is called with, of which all that is computed is of the examples.

    Attributes:
        were_taken: Whether some were, until now.
    """

    supports_higher_order_operators = True

    def __init__(self, given: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped.
        self.were_taken = False
        self._of_examples = WeakTensorKeyDictionary()
        self._note(given)

    def __torch_dispatch__(
        self,
        func: Any,  # An overload of an operation of PyTorch.
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note what it does."""
        output = func(*args, **(kwargs or {}))
        if self.were_taken:
            return output
        schema = getattr(func, "_schema", None)
        if schema is None:  # It is made of other operations, such as attention with a mask.
            if self._holds([args, kwargs]):
                self._note(output)
            return output
        arguments = dict(zip((argument.name for argument in schema.arguments), args, strict=False))
        arguments |= kwargs or {}
        held = [name for name, value in arguments.items() if self._holds(value)]
        if schema.name.rpartition("::")[2] in _MOVING:
            self.were_taken = any(name not in _INDICES for name in held)
        if held:
            self._note([output, [arguments.get(name) for name in _written(schema)]])
        return output

    def _holds(self, value: Any) -> bool:
        return any(tensor in self._of_examples for _, tensor in tensor_leaves(value))

    def _note(self, value: Any) -> None:
        for _, tensor in tensor_leaves(value):
            self._of_examples[tensor] = True


def _written(schema: Any) -> list[str]:
    """Return the arguments that an operation changes in place."""
    return [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
