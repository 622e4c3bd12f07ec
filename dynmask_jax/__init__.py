"""Dynamic masking for long-context Transformers: masks that depend on the training step.

    step ─► schedule ─► curriculum ─► plan ─► attention

`import dynmask_jax` needs jax alone. Flax modules are in `dynmask_jax.nnx` and `dynmask_jax.linen`,
pictures in `dynmask_jax.plot`.
"""

from dynmask_jax.bias_algebra import Bias as Bias
from dynmask_jax.bias_algebra import bias_tensor as bias_tensor
from dynmask_jax.biases import ALiBi as ALiBi
from dynmask_jax.biases import BiasFunction as BiasFunction
from dynmask_jax.biases import RelativeBuckets as RelativeBuckets
from dynmask_jax.context.layouts import LAYOUTS as LAYOUTS
from dynmask_jax.context.layouts import lay_out as lay_out
from dynmask_jax.context.layouts import layout_order as layout_order
from dynmask_jax.context.layouts import restore as restore
from dynmask_jax.context.machines import H100 as H100
from dynmask_jax.context.machines import V5E as V5E
from dynmask_jax.context.machines import V5P as V5P
from dynmask_jax.context.machines import V6E as V6E
from dynmask_jax.context.machines import Heads as Heads
from dynmask_jax.context.machines import Machine as Machine
from dynmask_jax.context.parallel import context_parallel as context_parallel
from dynmask_jax.context.simulator import Balance as Balance
from dynmask_jax.context.simulator import Choice as Choice
from dynmask_jax.context.simulator import balance as balance
from dynmask_jax.context.simulator import balances as balances
from dynmask_jax.curricula import Curriculum as Curriculum
from dynmask_jax.curricula import growing_chunks as growing_chunks
from dynmask_jax.curricula import growing_window as growing_window
from dynmask_jax.curricula import reveal as reveal
from dynmask_jax.dispatch import attention as attention
from dynmask_jax.dispatch import default_backend as default_backend
from dynmask_jax.dropout import Dropout as Dropout
from dynmask_jax.dropout import dropout_mask as dropout_mask
from dynmask_jax.errors import Unsupported as Unsupported
from dynmask_jax.mask_algebra import Mask as Mask
from dynmask_jax.mask_algebra import mask_tensor as mask_tensor
from dynmask_jax.masks import Causal as Causal
from dynmask_jax.masks import Chunks as Chunks
from dynmask_jax.masks import Everything as Everything
from dynmask_jax.masks import Predicate as Predicate
from dynmask_jax.masks import Prefix as Prefix
from dynmask_jax.masks import RandomChunks as RandomChunks
from dynmask_jax.masks import SameSegment as SameSegment
from dynmask_jax.masks import Select as Select
from dynmask_jax.masks import Sinks as Sinks
from dynmask_jax.masks import Strided as Strided
from dynmask_jax.masks import Window as Window
from dynmask_jax.online_softmax import merge as merge
from dynmask_jax.plans import Plan as Plan
from dynmask_jax.plans import plan as plan
from dynmask_jax.schedules import SCHEDULES as SCHEDULES
from dynmask_jax.schedules import Schedule as Schedule
from dynmask_jax.schedules import constant as constant
from dynmask_jax.schedules import cubic as cubic
from dynmask_jax.schedules import exponential as exponential
from dynmask_jax.schedules import linear as linear
from dynmask_jax.schedules import root as root
from dynmask_jax.schedules import sine as sine
from dynmask_jax.schedules import staircase as staircase
from dynmask_jax.spans import Span as Span
from dynmask_jax.spans import maximum as maximum
from dynmask_jax.spans import minimum as minimum
from dynmask_jax.tokens import Tokens as Tokens
from dynmask_jax.verdicts import Verdict as Verdict

__version__ = "0.1.0"
