"""Generation as a user of transformers does it, with its cache."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers, torch_peers


def generate(folder: Callable[[], Path]) -> Callable | str:
    """`(prompts, count) -> tokens`, greedy, without an end, of the model in a folder; or why there is none.

    Args:
      folder: writes the model, and is called only where transformers is installed.
    """
    if reason := peers.missing("torch") or peers.missing("transformers"):
        return reason
    torch, transformers = torch_peers.torch(), importlib.import_module("transformers")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder(), dtype=torch.float32).to(torch_peers.device())
    model.generation_config.eos_token_id = None

    def tokens(prompts: np.ndarray, count: int):
        ids = torch.from_numpy(prompts.astype(np.int64)).to(torch_peers.device())
        options = {"max_new_tokens": count, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert made.shape[1] == prompts.shape[1] + count
        return made.cpu().numpy()

    return tokens
