"""The chat template of a tuned model: the text around a user's document and the answer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

DOCUMENT, SUMMARY = "the-document-stands-here", "the-summary-stands-here"
"""What a template is rendered with in place of the texts."""


@dataclass(frozen=True)
class Around:
    """The text around a document and its summary: before, document, between, summary, after."""

    before: str
    between: str
    after: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template in the language of Jinja, as transformers has it.

    It is rendered in Jinja's sandbox. The time of day (`strftime_now`) is not there: a prompt is the same
    tomorrow.

    Attributes:
      source: the template.
      names: special tokens by the names that a template has for them, such as `bos_token`.
    """

    source: str
    names: Mapping[str, str]

    def around(self, instruction: str) -> Around:
        """The text around a document, which the user sends with an instruction after it, and the answer.

        Raises:
          ValueError: the template cannot be rendered, or does not show a message once.
        """
        question = {"role": "user", "content": f"{DOCUMENT}\n\n{instruction}"}
        asked = self._render([question], prompt=True)
        answered = self._render([question, {"role": "assistant", "content": SUMMARY}], prompt=False)
        before, between = _halves(asked, DOCUMENT)
        _, rest = _halves(answered, DOCUMENT)
        # Of the answer's own rendering only spaces count: some templates add what a model is not asked with.
        until, after = _halves(rest, SUMMARY)
        spaces = until.removeprefix(between) if until.startswith(between) else ""
        return Around(before, between + ("" if spaces.strip(" ") else spaces), after)

    def _render(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        try:
            template = environment.from_string(self.source)
            return template.render(
                messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **self.names
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template cannot be rendered: {error}") from error


def _halves(text: str, at: str) -> tuple[str, str]:
    if text.count(at) != 1:
        raise ValueError(f"the chat template shows a message {text.count(at)} times, needed once")
    before, _, after = text.partition(at)
    return before, after


def _to_json(value: Any, **options: Any) -> str:
    """Without the escapes for HTML that Jinja's own has."""
    return json.dumps(value, ensure_ascii=False, **options)


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)
