"""The trainer: language models on long text under a mask curriculum. `python -m train --help`.

docs/architecture.md says which folder does what, and where to add what.
"""
