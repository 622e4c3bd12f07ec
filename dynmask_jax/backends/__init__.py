"""Attention backends: each gives `(out, lse)` for `(q, k, v, plan, logits)`, one file a backend."""
