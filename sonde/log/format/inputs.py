"""Whether two sources hold the same inputs, as far as their digests show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The first one does not depend on how many examples were read at once; not every source has it.
_DIGESTS = ("examples_digest", "input_digest")


def same_inputs(facts: Mapping[str, Any], others: Mapping[str, Any]) -> bool | None:
    """Compare what two sources say of their inputs.

    Args:
        facts: What one source says of itself: its digests, among others.
        others: What the other one says.

    Returns:
        None where it cannot be told: one has no digest, or digests were made of batches of
        different sizes.

    Example:
        >>> same_inputs({"input_digest": "a1"}, {"input_digest": "b2"})
        False
        >>> same_inputs({"input_digest": "batches of 8: a1"}, {"input_digest": "b2"}) is None
        True
    """
    for name in _DIGESTS:
        digest, other = facts.get(name), others.get(name)
        if digest and other and _made_of(digest) == _made_of(other):
            return bool(digest == other)
    return None


def _made_of(digest: str) -> str:
    return digest.rpartition(": ")[0]
