"""A batch of rows: what the train step and the evaluation step read."""

from dynmask_jax.array_typing import Array, Float, Int, pytree


@pytree
class Batch:
    """Rows of tokens, each beside the token that follows it.

    A row may hold several documents (segments 1, 2, …) and padding (segment 0). Leaves are NumPy
    arrays as they come from the input pipeline, or JAX arrays.

    Attributes:
      inputs: the tokens read.
      targets: the token after each, to be predicted.
      weights: of each target in the loss: 1, or 0 for padding and for what the task does not ask for.
      positions: what masks and rotary embeddings read. Documents start at 0; for `summarize` the
        document ends before, and the summary starts at, `data.length`, in every segment.
      segments: the document within the row, from 1; 0 for padding.
      context: how many tokens of its own document come before each, in this row.
    """

    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    context: Int[Array, "B T"]
