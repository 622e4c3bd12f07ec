"""A batch of rows: what the train step and the evaluation step read."""

import numpy as np

from dynmask_jax.array_typing import Array, Float, Int, pytree

Anywhere = Array | np.ndarray


@pytree
class Batch:
    """Rows of tokens, each beside the token that follows it.

    A row may hold several documents (segments 1, 2, …) and padding (segment 0). Leaves are NumPy
    arrays as they come from the input pipeline, or JAX arrays.

    Attributes:
      inputs: the tokens read.
      targets: the token after each, to be predicted.
      weights: of each target in the loss: 1, or 0 for padding and for targets that the task does not predict.
      positions: what masks and rotary embeddings read. Documents start at 0; of a task with a boundary the
        prefix ends just before `data.length` in every segment, and the rest starts there.
      segments: the document within the row, from 1; 0 for padding.
      context: the number of tokens of the same document before each, in this row.
      target_bytes: the bytes of text that each target spells, `Tokenizer.token_bytes`; 0 for end tokens.
    """

    inputs: Int[Anywhere, "B T"]
    targets: Int[Anywhere, "B T"]
    weights: Float[Anywhere, "B T"]
    positions: Int[Anywhere, "B T"]
    segments: Int[Anywhere, "B T"]
    context: Int[Anywhere, "B T"]
    target_bytes: Int[Anywhere, "B T"]
