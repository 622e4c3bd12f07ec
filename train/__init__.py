"""The trainer: language models on long text under a mask curriculum. `python -m train --help`."""
