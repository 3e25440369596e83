"""Taking knowledge out of the weights again: sparse multi-step updates, and the gradient methods they are compared with."""

__all__: list[str] = []
