# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dynmask/dynmask_jax/blob/main/notebooks/masks.ipynb)
#
# # Masks that change while you train
#
# An attention mask says which keys each query may see. In `dynmask_jax` it is one short expression, it
# may depend on the training step, and attention costs only what it shows. This notebook draws masks,
# lets them grow with the step, and finds the work that they save. A CPU is enough.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dynmask_jax") is None:
    # pip keeps the jax that is already there: Colab's fits.
    repository = "dynmask_jax[plot] @ git+https://github.com/dynmask/dynmask_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", repository], check=True)

# %%
import timeit

import jax
import jax.numpy as jnp
from IPython.display import display
from ipywidgets import IntSlider, interact

import dynmask_jax as dm
from dynmask_jax.plot import draw_curriculum, draw_mask, draw_masks, draw_plan

# %% [markdown]
# ## The masks that come with the library
#
# A mask is asked about *tokens*: each has a position, and the number of the document it belongs to.
# Here are 64 tokens of one document. In every picture a row is a query, a column is a key, and blue
# means that the query sees the key.

# %%
tokens = dm.Tokens.sequence(64)
draw_masks(
    {
        "Everything()": dm.Everything(),
        "Causal()": dm.Causal(),
        "Window(12)": dm.Window(12),
        "Chunks(16)": dm.Chunks(16),
        "Prefix(12)": dm.Prefix(12),
        "Sinks(4)": dm.Sinks(4),
        "Strided(8)": dm.Strided(8),
        "RandomChunks(8, 0.3)": dm.RandomChunks(8, 0.3),
    },
    tokens,
)

# %% [markdown]
# A window counts the query's own key, and leaves later keys alone until `Causal()` hides them. Masks
# combine with `&` (both), `|` (either) and `~` (not):

# %%
causal = dm.Causal()
draw_masks(
    {
        "causal & Window(12)": causal & dm.Window(12),
        "causal & Chunks(16)": causal & dm.Chunks(16),
        "causal | Prefix(12)": causal | dm.Prefix(12),
        "causal & (Window(12) | Sinks(4))": causal & (dm.Window(12) | dm.Sinks(4)),
        "causal & ~Window(12)": causal & ~dm.Window(12),
    },
    tokens,
)

# %% [markdown]
# ## Where the mask is applied matters
#
# A small example: five tokens 1 … 5, and a staircase of a mask in which row i sees the columns
# 0 … 4 − i.

# %%
staircase = dm.Predicate(lambda q, k: q.position + k.position <= 4)
five = dm.Tokens.sequence(5)
draw_mask(staircase, five)

# %% [markdown]
# One may be tempted to multiply the scores by the mask *before* the softmax. But that makes a hidden
# score 0, not −∞, and the softmax still gives it weight. With the identity matrix as values, attention
# returns its weights, so that both ways can be compared:

# %%
q = k = jnp.zeros((5, 5)).at[:, 0].set(jnp.arange(1.0, 6.0))
scores = q @ k.T / jnp.sqrt(5)
visible = dm.mask_tensor(staircase, five)

multiplied = jax.nn.softmax(scores * visible)
ours = dm.attention(q[None, :, None], k[None, :, None], jnp.eye(5)[None, :, None], staircase)[0, :, 0]

for name, weights in (("multiplied", multiplied), ("ours", ours)):
    leak = jnp.where(visible, 0, weights).sum(axis=1)
    print(f"{name:>10}: weight on hidden keys, row by row:", *(f"{row:.4f}" for row in leak))
print("exactly 0 in ours:", bool((ours[~visible] == 0).all()))

# %% [markdown]
# ## Curricula: the mask as a function of the step
#
# A *schedule* takes the training step to a number, and a *curriculum* takes it to a mask. *Exposure* is
# the number of visible pairs, divided by those at the end. First, a window that grows:

# %%
steps = [0, 25, 50, 75, 100]
growing = dm.growing_window(dm.linear(4, 64, steps=100))
draw_curriculum(growing, steps, tokens)

# %% [markdown]
# Chunks that grow. Tokens near an edge can lose sight of each other on the way: this curriculum is the
# one that is not *nested*.

# %%
draw_curriculum(dm.growing_chunks(dm.linear(4, 64, steps=100)), steps, tokens)

# %% [markdown]
# Or cut the sequence into chunks and reveal the earlier ones, in one of five orders. All of them are
# nested: what is shown stays shown.

# %%
for order in ("nearest", "oldest", "random", "strided", "partial"):
    print(order)
    display(draw_curriculum(dm.reveal(8, dm.linear(0.0, 1.0, steps=100), order), steps, tokens))

# %% [markdown]
# ## Move through training
#
# Attention works in blocks. A *plan* says of each block whether to skip it (no pair is visible), to
# compute it in full (every pair is), or to test it pair by pair. Drag the slider and watch how many
# blocks are skipped. (It needs a live notebook.)

# %%
end = dm.plan(growing(100), tokens, block_q=8, block_k=8)


@interact(step=IntSlider(25, min=0, max=100, step=5, continuous_update=False))
def show(step):
    the_plan = dm.plan(growing(step), tokens, block_q=8, block_k=8)
    figure = draw_plan(the_plan, pairs=True)
    skipped = figure.axes[0].get_title()
    figure.axes[0].set_title(f"step {step}: exposure {float(the_plan.exposure(end)):.0%}\n{skipped}")
    return figure


# %% [markdown]
# ## Your own mask
#
# Any expression over the two tokens will do. Which blocks it lets us skip is worked out from the
# expression itself, without ever writing out the whole matrix of pairs. This one sees 8 keys in
# every 64:

# %%
comb = causal & dm.Predicate(lambda q, k: (q.position - k.position) % 64 < 8)
more = dm.Tokens.sequence(256)
draw_plan(dm.plan(comb, more, block_q=16, block_k=16), pairs=True)

# %% [markdown]
# A block is skipped only where it falls into a gap of the pattern as a whole. So blocks must be smaller
# than the gap. Blocks of 32 miss it here, save for those that `Causal()` hides. For real attention,
# where blocks are of 128 tokens or more, make the stripes and gaps wider instead.

# %%
for block in (8, 16, 32):
    header, *_ = str(dm.plan(comb, more, block_q=block, block_k=block)).splitlines()
    print(header)

# %% [markdown]
# ## Several documents in one row
#
# Short documents are packed into one sequence. `SameSegment()` keeps them apart, and what is left over
# at the end is padding, which sees nothing and is never seen.

# %%
packed = dm.Tokens.packed([24, 10, 22], length=64)
draw_plan(dm.plan(causal & dm.SameSegment(), packed, block_q=8, block_k=8), pairs=True)

# %% [markdown]
# ## And it saves time
#
# Now real attention, over 4,096 tokens and four heads. The window is data: all windows share one
# compilation. (Times are of this machine, whatever it is doing besides.)

# %%
length = 4_096
queries, keys, values = jax.random.normal(jax.random.key(0), (3, 1, length, 4, 64))


@jax.jit
def attend(queries, keys, values, window):
    print("compiling")  # Python runs only while JAX traces, so this shows up once
    the_plan = dm.plan(causal & dm.Window(window), dm.Tokens.sequence(length))
    return dm.attention(queries, keys, values, the_plan), (the_plan.codes == 0).mean()


def milliseconds(window):
    times = timeit.repeat(
        lambda: jax.block_until_ready(attend(queries, keys, values, window)), number=1, repeat=5
    )
    return 1e3 * min(times)


for window in (256, 512, 1_024, 2_048, 4_096):
    _, skipped = attend(queries, keys, values, window)
    print(f"window {window:5,}: {float(skipped):3.0%} of blocks skipped, {milliseconds(window):6.1f} ms")

# %% [markdown]
# Next: `dynmask_jax.nnx` and `dynmask_jax.linen` put this into Flax models, and `python -m train`
# trains one through a whole curriculum, from a checkout of the repository. The README shows how.
