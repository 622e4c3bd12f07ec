"""Writes a trained model as a Hugging Face folder: config.json, weights, tokenizer."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from train.checkpoint.export import Weights
from train.checkpoint.folder import pretrained_files
from train.checkpoint.load import SAFETENSORS
from train.data.tasks import task_of
from train.data.tokenizers import Tokenizer
from train.pretrained.export_config import config_of
from train.pretrained.folder import COMPANIONS, CONFIG, TOKENIZERS, PretrainedFolder
from train.pretrained.read import stored_config
from train.pretrained.write import Contents, write_folder

StoredDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
      folder: the Hugging Face folder that it was, or the files of it that its run keeps; None: there was
        none.
      config: the object of its config.json, with the dtype that its weights had; None without a folder.
      length: tokens of the rows that it was trained at since; 0: it was not.
    """

    folder: PretrainedFolder | None
    config: dict[str, Any] | None
    length: int

    @classmethod
    def of(cls, source: Path, weights: Weights) -> "Origin":
        """The origin of the weights that `load_model` gave for a path.

        Raises:
          ValueError: the path is a file, which has the weights alone of a model that came from a folder.
        """
        if source.suffix == SAFETENSORS and weights.origin is not None:
            raise ValueError(
                f"{source} holds the weights alone of a model that came from a Hugging Face folder, without "
                "its other files, fields of config.json and dtype, which a folder needs: export from "
                f"{weights.origin}, which has them"
            )
        if (folder := PretrainedFolder.at(source)) is not None:
            return cls(folder, stored_config(folder), 0)
        folder = pretrained_files(source)
        return cls(folder, folder and folder.config(), weights.run.data.length)


def export_folder(
    weights: Weights,
    tokenizer: Tokenizer,
    origin: Origin,
    to: Path,
    *,
    dtype: StoredDtype | None = None,
    overwrite: bool = False,
):
    """Writes a folder that transformers loads.

    Of a model that came from such a folder every file is that of the folder, except the weights, and in
    config.json what training changed: the context and the rotary scaling; and the tokenizer, where another
    was named. The folder appears whole or not at all.

    Args:
      weights: the model.
      tokenizer: its tokenizer.
      origin: where it came from.
      to: the folder to write.
      dtype: of the weights; None: that of the origin, float32 where there is none.
      overwrite: replace the folder if it exists.

    Raises:
      FileExistsError: the folder exists, and `overwrite` is false.
      OSError: it cannot be written.
      ValueError: no architecture of transformers computes this model or shows a token what it sees; or its
        tokenizer is none that transformers reads.
    """
    if task_of(weights.run).reads_ahead(weights.run):
        raise ValueError(
            "summarize.prefix: tokens of a document see later ones (bidirectional), as in no architecture of "
            "transformers; of a run with the prefix causal a folder can be written"
        )
    model, source = weights.run.model, origin.config
    model = replace(
        model,
        vocab_size=model.vocabulary(weights.vocabulary),
        max_position_embeddings=max(model.max_position_embeddings or 0, origin.length),
    )
    stored = dtype or (source or {}).get("dtype") or (source or {}).get("torch_dtype") or "float32"
    config = config_of(model, stored, source)
    path = Path(weights.run.data.tokenizer)
    if origin.folder is None:
        config |= {"eos_token_id": tokenizer.end, "bos_token_id": tokenizer.begin, "pad_token_id": None}
        files = _tokenizer_files(path, tokenizer)
    else:
        files = _companions(origin.folder) | {_tokenizer_name(path): path}
    write_folder(Contents(model, weights.params, config, stored, files), to, overwrite=overwrite)


def _companions(folder: PretrainedFolder) -> dict[str, Path | str]:
    paths = {name: folder.path / name for name in COMPANIONS if name != CONFIG}
    return {name: path for name, path in paths.items() if path.is_file()}


def _tokenizer_name(path: Path) -> str:
    """The name under which transformers looks for a tokenizer."""
    name = {Path(name).suffix: name for name in TOKENIZERS}.get(path.suffix)
    if name is None:
        raise ValueError(f"data.tokenizer: transformers reads {' or '.join(TOKENIZERS)}, not {path}")
    return name


def _tokenizer_files(path: Path, tokenizer: Tokenizer) -> dict[str, Path | str]:
    """The files of a tokenizer that was trained here."""
    from tokenizers import Tokenizer as Library

    if path.suffix != ".json":
        raise ValueError(
            f"data.tokenizer: transformers reads a tokenizer.json, not {path}; `python -m train tokenizer` "
            "trains one"
        )
    library = Library.from_file(str(path))
    tokens = {"eos_token": tokenizer.end, "bos_token": tokenizer.begin}
    names: dict[str, Any] = {token: library.id_to_token(id) for token, id in tokens.items() if id is not None}
    about = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2) + "\n"
    return {TOKENIZERS[0]: path, "tokenizer_config.json": about}
