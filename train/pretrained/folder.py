"""The files of a folder that transformers saved: config, weights, tokenizer. No pickle is ever opened."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.chat_template import ChatTemplate
from train.data.pair_layout import Conventions
from train.disk import write_atomically

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""The tokenizer's file, the first that is there."""
COMPANIONS = (
    CONFIG,
    GENERATION,
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt"),
)
"""The files beside the weights that transformers reads."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class PretrainedFolder:
    """A folder in the layout of Hugging Face.

    Attributes:
      path: of the folder.
    """

    path: Path

    @classmethod
    def at(cls, path: Path) -> "PretrainedFolder | None":
        """The folder at a path, if there is one whose config.json names a model of transformers."""
        config = path / CONFIG
        try:
            values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
        except ValueError:
            return None
        return cls(path) if isinstance(values, dict) and "model_type" in values else None

    def config(self) -> dict[str, Any]:
        """The object in config.json."""
        return _object(self.path / CONFIG)

    def generation(self) -> dict[str, Any]:
        """The object in generation_config.json; an empty one where there is no such file."""
        path = self.path / GENERATION
        return _object(path) if path.is_file() else {}

    def weight_files(self) -> dict[Path, tuple[str, ...] | None]:
        """The files of the weights, and the names of the tensors that the index says are in each.

        Raises:
          FileNotFoundError: there are none, or one that the index names is missing.
          ValueError: there are only pickles; or the index cannot be read.
        """
        whole, index = self.path / WEIGHTS, self.path / INDEX
        if whole.is_file():
            return {whole: None}
        if not index.is_file():
            pickles = sorted(found.name for kind in PICKLES for found in self.path.glob(kind))
            if pickles:
                raise ValueError(
                    f"{self.path} holds its weights as pickles ({pickles[0]}), which can run any code and "
                    "are never opened: save them with transformers' save_pretrained, which writes safetensors"
                )
            raise FileNotFoundError(f"{self.path} has neither {WEIGHTS} nor {INDEX}")
        listed = _object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        if unsafe := [name for name in listed.values() if Path(name).name != name]:
            raise ValueError(f"{index} names {unsafe[0]!r}, which is not in the folder")
        return {self.path / file: _names(listed, file) for file in sorted(set(listed.values()))}

    def tokenizer(self) -> Path:
        """The file of the tokenizer.

        Raises:
          FileNotFoundError: there is none.
        """
        if (found := self.find_tokenizer()) is None:
            raise FileNotFoundError(
                f"{self.path} has no tokenizer ({' or '.join(TOKENIZERS)}): name one with --data.tokenizer"
            )
        return found

    def find_tokenizer(self) -> Path | None:
        """The file of the tokenizer; None: there is none."""
        paths = (self.path / name for name in TOKENIZERS)
        return next((path for path in paths if path.is_file()), None)

    def tokenizer_config(self) -> dict[str, Any]:
        """The object in tokenizer_config.json; an empty one where there is no such file."""
        path = self.path / "tokenizer_config.json"
        return _object(path) if path.is_file() else {}

    def end_token(self) -> str | None:
        """The token that ends a text, as tokenizer_config.json names it; None: it does not."""
        return _content(self.tokenizer_config().get("eos_token"))

    def conventions(self) -> Conventions:
        """The chat template, and the end tokens of generation_config.json.

        Raises:
          ValueError: a file cannot be read; or an end token is no number.
        """
        ends = self.generation().get("eos_token_id")
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if not all(type(end) is int for end in ends):
            raise ValueError(f"{self.path / GENERATION} must have numbers in eos_token_id, got {ends!r}")
        return Conventions(self._chat_template(), tuple(ends))

    def _chat_template(self) -> ChatTemplate | None:
        about, own = self.tokenizer_config(), self.path / "chat_template.jinja"
        source = about.get("chat_template")
        if isinstance(source, list):  # several, by their names
            by_name = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
            source = by_name.get("default")
        if own.is_file():
            source = own.read_text(encoding="utf-8")
        if not isinstance(source, str):
            return None
        names = {name: _content(token) for name, token in about.items() if name.endswith("_token")}
        return ChatTemplate(source, {name: text for name, text in names.items() if isinstance(text, str)})

    def copy_companions(self, to: Path, config: Mapping[str, Any]):
        """Copies the files beside the weights to a folder, which is created, with this config.json."""
        to.mkdir(parents=True, exist_ok=True)
        for name in COMPANIONS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, to / name)
        if config != self.config():
            write_atomically(to / CONFIG, json.dumps(config, indent=2) + "\n")


def _content(token: Any) -> Any:
    """The text of a token, which may be described by an object."""
    return token.get("content") if isinstance(token, dict) else token


def _names(listed: Mapping[str, str], file: str) -> tuple[str, ...]:
    return tuple(name for name, place in listed.items() if place == file)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read: it holds {type(values).__name__}, not an object")
    return values
