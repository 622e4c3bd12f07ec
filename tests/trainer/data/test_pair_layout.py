"""What lies around a document and its summary: templates, chat templates, and which tokens they are."""

from pathlib import Path

import numpy as np
import pytest
from train_cases import write_text

from train.config.sections import BASE_TEMPLATE, Summarize
from train.data.bpe import train_bpe
from train.data.chat_template import Around, ChatTemplate
from train.data.pair_layout import Conventions, PairLayout
from train.data.tokenizers import Bytes, Tokenizer, load_tokenizer

GEMMA = """{{ bos_token }}{% for message in messages %}
<turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</turn>{% endif %}{% endfor %}"
)
THINKING = MISTRAL.replace("{% else %} ", "{% else %}<think></think>")
NAMES = {"bos_token": "<s>"}
DOCUMENT, ANSWER = "mask <turn> key", "query step"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """A byte-level BPE with special tokens."""
    from tokenizers import Tokenizer as Library

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    train_bpe([str(write_text(folder))], 270, {}, folder / "bpe.json")
    library = Library.from_file(str(folder / "bpe.json"))
    library.add_special_tokens(["<s>", "<turn>", "</turn>"])
    (folder / "tokenizer.json").write_text(library.to_str())
    return load_tokenizer(str(folder / "tokenizer.json"), begin_token="<s>")


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text in which special tokens stand for their names."""
    return tokenizer.encode_template(text, goes_on=False).tolist()


def whole(layout: PairLayout, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an example."""
    document, summary = (layout.encode(tokenizer, [text], n)[0] for n, text in enumerate((DOCUMENT, ANSWER)))
    return np.concatenate([layout.before, document, layout.between, summary, layout.after]).tolist()


def test_without_a_template_ends_lie_between_and_after(tokenizer):
    layout = PairLayout.of(Summarize(), tokenizer, Conventions(ends=(5, tokenizer.end)))
    assert layout.before.tolist() == [tokenizer.begin]
    assert layout.between.tolist() == layout.after.tolist() == [tokenizer.end]
    assert layout.ends == (tokenizer.end, 5)
    assert (layout.size, layout.loss_from(64)) == (2, 64)
    assert not layout.key
    assert PairLayout.of(Summarize(), Bytes()).before.tolist() == []


def test_a_template_is_encoded_around_the_texts_and_words_keep_their_space(tokenizer):
    layout = PairLayout.of(Summarize(template="Read: " + BASE_TEMPLATE + " (done)"), tokenizer)
    assert tokenizer.decode(whole(layout, tokenizer)) == (f"Read: {DOCUMENT}\n\nSummary: {ANSWER} (done)")
    between, (summary,) = layout.between, layout.encode(tokenizer, [ANSWER], 1)
    assert tokenizer.decode(between) == "\n\nSummary:"
    assert tokenizer.decode(summary) == f" {ANSWER}"
    assert summary.tolist() == tokenizer.encode([f" {ANSWER}"])[0].tolist()
    assert layout.before[0] == tokenizer.begin
    assert layout.after[-1] == tokenizer.end
    assert layout.loss_from(64) == 64 + len(between) - 1
    assert layout.key


def test_a_chat_template_is_rendered_and_ends_with_the_turn(tokenizer):
    (turn,) = ids(tokenizer, "</turn>")
    conventions = Conventions(ChatTemplate(GEMMA, NAMES), ends=(turn,))
    layout = PairLayout.of(Summarize(template="chat", instruction="Sum up."), tokenizer, conventions)
    before, after = "<s><turn>user\n", "\n\nSum up.</turn>\n<turn>model\n"
    assert layout.before.tolist() == ids(tokenizer, before)
    assert layout.between.tolist() == ids(tokenizer, after)
    assert layout.after.tolist() == [turn]
    assert turn in layout.ends
    # What the document spells is no turn.
    spelt = [tokenizer.encode([text])[0].tolist() for text in (DOCUMENT, ANSWER)]
    assert whole(layout, tokenizer) == [
        *ids(tokenizer, before), *spelt[0], *ids(tokenizer, after), *spelt[1], turn
    ]  # fmt: skip
    assert turn not in spelt[0]
    assert ids(tokenizer, "<turn>")[0] not in spelt[0]
    # Without the turn among the end tokens, the tokenizer's own end follows all that the template has.
    plain = PairLayout.of(Summarize(template="chat"), tokenizer, Conventions(ChatTemplate(GEMMA, NAMES)))
    assert plain.after.tolist() == [turn, *ids(tokenizer, "\n"), tokenizer.end]


@pytest.mark.parametrize(
    ("source", "between"), [(MISTRAL, "\n\nSum up. [/INST] "), (THINKING, "\n\nSum up. [/INST]")]
)
def test_a_model_is_asked_as_it_will_be_and_only_spaces_go_to_the_answer(source, between):
    around = ChatTemplate(source, NAMES).around("Sum up.")
    assert around == Around("<s>[INST] ", between, "</turn>")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for", "the chat template cannot be rendered: "),
        ("{{ raise_exception('no user') }}", "cannot be rendered: no user"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered: access to attribute '__class__'"),
        ("{{ messages[0].role }}", "the chat template shows a message 0 times, needed once"),
    ],
)
def test_chat_templates_that_are_refused(source, words, tokenizer):
    chat = Conventions(ChatTemplate(source, {}))
    with pytest.raises(ValueError, match=r"^summarize\.template: ") as refused:
        PairLayout.of(Summarize(template="chat"), tokenizer, chat)
    assert words in str(refused.value)


def test_chat_needs_a_template_and_a_tokenizer_that_reads_it(tokenizer):
    asked = Summarize(template="chat")
    with pytest.raises(ValueError, match=r"chat needs a chat template, and there is none: neither chat_temp"):
        PairLayout.of(asked, tokenizer)
    with pytest.raises(ValueError, match=r"chat needs a tokenizer\.json"):
        PairLayout.of(asked, Bytes(), Conventions(ChatTemplate(GEMMA, NAMES)))


def test_texts_that_go_on_have_no_space_that_is_not_theirs(tmp_path):
    """Of a tokenizer that puts a space before each text, as those of sentencepiece do."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {"</s>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "\n": 5}
    library = Library(models.BPE(vocabulary, [("▁", "a")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), end_token="</s>")
    assert [x.tolist() for x in tokenizer.encode(["ab", "\nb"])] == [[4, 3], [1, 5, 3]]
    assert [x.tolist() for x in tokenizer.encode_after([" ab", "\nb", " b"])] == [[4, 3], [5, 3], [1, 3]]
