"""What the engine and the decoder know of a sequence's memory, wherever it lies."""

from typing import Protocol


class Cache(Protocol):
    """A sequence's memory, wherever the scheme keeps it."""

    capacity: int
    length: int
    failed: bool  # an error of a step was about this sequence, not about others in its batch

    def commit(self, tokens: int) -> None:
        """These tokens are part of the sequence now."""
        ...

    def rest(self) -> None:
        """The turn is over: nothing will be asked of this sequence for a while."""
        ...

    def wake(self, tokens: int) -> int:
        """The sequence takes part in the next step with up to `tokens` tokens; how many it can take now, at least one.

        Raises what makes that impossible, for this sequence only.
        """
        ...

    def free(self) -> None:
        """Wipe and give back."""
        ...
