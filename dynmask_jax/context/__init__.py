"""Attention over a sequence that several devices hold; its public names are in `dynmask_jax`."""
