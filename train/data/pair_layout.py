"""The tokens around a document and its summary in a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.config.sections import CHAT, DOCUMENT, SUMMARY, Summarize
from train.data.chat_template import Around, ChatTemplate
from train.data.tokenizers import Ids, Tokenizer


@dataclass(frozen=True)
class Conventions:
    """What the folder of a pretrained model says about texts.

    Attributes:
      chat: its chat template.
      ends: tokens that end a text, beside the tokenizer's end.
    """

    chat: ChatTemplate | None = None
    ends: tuple[int, ...] = ()


@dataclass(frozen=True)
class PairLayout:
    """What lies around a document and its summary: before, document, between, summary, after.

    The document ends just before position data.length, and `between` begins there: so a curriculum, which
    shows the positions before data.length as it grows, hides nothing of it. Documents are cut, and nothing
    else. Made by `PairLayout.of`.

    Attributes:
      before: tokens before the document.
      between: tokens between document and summary, one at least, of which the last predicts the summary's
        first.
      after: tokens after the summary, to the first end token, which is the last.
      spaces: what document and summary are encoded with before them: a word's token begins with its space.
      goes_on: whether they are encoded as texts that go on from others.
      ends: the tokens that end a generated summary.
    """

    before: Ids
    between: Ids
    after: Ids
    spaces: tuple[str, str]
    goes_on: tuple[bool, bool]
    ends: tuple[int, ...]

    @classmethod
    def of(
        cls, options: Summarize, tokenizer: Tokenizer, conventions: Conventions = Conventions()
    ) -> "PairLayout":
        """The layout of a run's section `summarize`.

        Raises:
          ValueError: the folder has no chat template, or one that cannot be rendered; the tokenizer cannot
            read its special tokens; or it makes no token of what lies between document and summary.
        """
        ends = tuple(dict.fromkeys((tokenizer.end, *conventions.ends)))
        begin = tokenizer.begun(np.zeros(0, np.int32))
        if options.template is None:
            end = np.array([tokenizer.end], np.int32)
            return cls(begin, end, end, ("", ""), (False, False), ends)
        if options.template == CHAT:
            around = _chat(options, tokenizer, conventions.chat)
            encode, start = tokenizer.encode_template, np.zeros(0, np.int32)  # it names the begin token
        else:
            before, _, rest = options.template.partition(DOCUMENT)
            between, _, after = rest.partition(SUMMARY)
            around, start = Around(before, between, after), begin

            def encode(text: str, *, goes_on: bool) -> Ids:
                return (tokenizer.encode_after if goes_on else tokenizer.encode)([text])[0]

        before, between = around.before.rstrip(" "), around.between.rstrip(" ")
        spaces = around.before[len(before) :], around.between[len(between) :]
        tokens = encode(between, goes_on=True)
        if not len(tokens):
            raise ValueError(
                f"summarize.template: the tokenizer makes no token of {between!r}, between document and "
                "summary"
            )
        first = np.concatenate([start, encode(before, goes_on=False)]) if before else start
        after = _to_an_end(encode(around.after, goes_on=True) if around.after else start[:0], ends)
        return cls(first, tokens, after, spaces, (bool(before), True), ends)

    @property
    def size(self) -> int:
        """The inputs of a row that are neither document nor summary; the last token is a target alone."""
        return len(self.before) + len(self.between) + len(self.after) - 1

    def loss_from(self, length: int) -> int:
        """The position whose target is a summary's first token, in rows of data.length."""
        return length + len(self.between) - 1

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str], part: int) -> list[Ids]:
        """The tokens of documents, part 0, or of summaries, part 1."""
        encode = tokenizer.encode_after if self.goes_on[part] else tokenizer.encode
        return encode([self.spaces[part] + text for text in texts])

    @property
    def key(self) -> list[Any]:
        """What the tokens of documents and summaries depend on; empty for the layout without a template."""
        return [self.spaces, self.goes_on] if any(self.goes_on) else []


def _chat(options: Summarize, tokenizer: Tokenizer, chat: ChatTemplate | None) -> Around:
    if chat is None:
        raise ValueError(
            "summarize.template: chat needs a chat template, and there is none: neither chat_template.jinja "
            "nor chat_template in tokenizer_config.json of a Hugging Face folder that the model came from"
        )
    if not tokenizer.names_special_tokens:
        raise ValueError(
            "summarize.template: chat needs a tokenizer.json, in which a template can name special tokens"
        )
    try:
        return chat.around(options.instruction)
    except ValueError as error:
        raise ValueError(f"summarize.template: {error}") from error


def _to_an_end(tokens: Ids, ends: tuple[int, ...]) -> Ids:
    """The tokens up to the first end; with an end after them where they have none."""
    (places,) = np.nonzero(np.isin(tokens, ends))
    return tokens[: places[0] + 1] if len(places) else np.append(tokens, np.int32(ends[0]))
