"""Configs by name. A preset is its parent plus a difference."""

from dataclasses import replace

from train.config.operation import Checkpoints, Evaluation, Generation, Mesh
from train.config.run import Run
from train.config.sections import Curriculum, Data, Model, Optimizer


def base() -> Run:
    """A mid-sized run on text of your own: --data.paths FILE_OR_FOLDER …

    Needs: text files, or JSONL with a column `text`; without paths it reads the Python standard
    library's source. Runs anywhere; on a laptop's CPU a step takes seconds.
    Expect: 3 million weights and rows of 4,096 bytes, until you change options.
    """
    return Run()


def demo() -> Run:
    """A few minutes on two CPU cores: chunks of 32 bytes grow to 4,096.

    Needs: nothing; it reads the Python standard library's source.
    Expect: four minutes; validation from 8.0 to about 2.7 bits per byte; a step at the start takes less
    than half the time of one at the end.
    """
    return replace(
        base(),
        name="demo",
        steps=800,
        model=Model(layers=2, width=64, heads=2, kv_heads=1, hidden=192),
        data=Data(rows="chunked"),
        optimizer=Optimizer(learning_rate=5e-3, warmup=0.02),
        curriculum=Curriculum(multiple_of=32, share=0.8),
        evaluation=Evaluation(every=160),
        checkpoints=Checkpoints(every=200),
    )


def lm_8k() -> Run:
    """A language model of 126 million weights on rows of 8,192 tokens, for one accelerator.

    Needs: text (--data.paths) and a tokenizer (--data.tokenizer; the weights are counted with 32,768
    tokens, and are 76 million with bytes). State and temporaries take 3.2 GiB as compiled for a TPU v5e of
    16 GiB, so there is room for a larger data.batch / optimizer.accumulate.
    Expect: 1.3 billion tokens and 1.4e18 operations: an estimated 5 hours at 40% of a v5e's 197e12 FLOP/s,
    which has not been measured.
    """
    return replace(
        base(),
        name="lm-8k",
        steps=20_000,
        model=Model(
            layers=12,
            width=768,
            heads=12,
            kv_heads=4,
            hidden=2_048,
            rope_theta=100_000.0,
            dtype="bfloat16",
            remat="full",
        ),
        data=Data(length=8_192, batch=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup=0.02, accumulate=4, ema=0.999),
        curriculum=Curriculum(start=256, multiple_of=256),
        evaluation=Evaluation(every=1_000, rows=64, needles=8),
        checkpoints=Checkpoints(every=500, keep_every=5_000),
    )


def lm_32k() -> Run:
    """lm-8k on rows of 32,768 tokens, with five local layers to each global one.

    Needs: long texts (a row of short ones teaches no more than lm-8k's), a tokenizer, and 6.5 GiB as
    compiled for a TPU v5e.
    Expect: 2.6 billion tokens and, with five of six layers local, about twice lm-8k's operations.
    """
    parent = lm_8k()
    return replace(
        parent,
        name="lm-32k",
        model=replace(
            parent.model,
            rope_theta=1_000_000.0,
            pattern=("local", "local", "local", "local", "local", "global"),
            local_window=1_024,
        ),
        data=replace(parent.data, length=32_768, batch=4),
        evaluation=replace(parent.evaluation, rows=16),
    )


def summarize() -> Run:
    """Summaries of documents of up to 32,768 tokens, of your own pairs: --data.paths pairs.jsonl

    Needs: pairs of document and summary, thousands of them or more; a tokenizer, best of their own text
    (python -m train tokenizer pairs.jsonl); 2.4 GiB as compiled for a TPU v5e.
    Expect: 57 million weights, trained from nothing: with few pairs its summaries have the pairs' words, and
    score below the lead baseline that is printed beside them. `python -m train summarize FILE --run
    runs/summarize` summarises a file with it.
    """
    parent = lm_8k()
    return replace(
        parent,
        name="summarize",
        task="summarize",
        steps=5_000,
        data=replace(parent.data, length=32_768, batch=4, held_out=0.1),
        model=replace(parent.model, layers=8, width=512, heads=8, kv_heads=4, hidden=1_408),
        optimizer=replace(parent.optimizer, learning_rate=5e-4, warmup=0.05),
        # Chunks of several blocks: a packed row's documents start anywhere, and a block across two chunks is
        # skipped only if neither is shown.
        curriculum=Curriculum(kind="reveal", order="strided", schedule="linear", start=512, chunk=2_048),
        evaluation=Evaluation(every=500, rows=16, summaries=32),
        generation=Generation(tokens=400),
    )


def extend() -> Run:
    """A model that exists, on rows longer than it was trained at: --init-from FOLDER --data.paths FILE …

    Needs: a Hugging Face folder or a run of ours; texts as long as the new rows. --data.length is the new
    context, by default four times the old one. Of the folder come the old context (config.json's
    max_position_embeddings, or the rows of the run), with which chunks begin to grow, and the rotary scaling:
    YaRN, or more of the kind that the model has.
    Expect: 400 steps of 8 rows; each is computed alone, so that memory is that of one. The learning rate is
    2e-5, or the last one of a run of ours. Validation and report have both contexts, before and after.
    """
    return replace(
        base(),
        name="extend",
        # Rate, warm-up of 20 steps, no weight decay and the number of steps as in YaRN, arXiv:2309.00071.
        steps=400,
        model=Model(dtype="bfloat16", remat="full"),
        data=Data(length=32_768, batch=8),
        optimizer=Optimizer(learning_rate=2e-5, warmup=0.05, weight_decay=0.0, accumulate=8),
        curriculum=Curriculum(start=8_192, multiple_of=256),
        evaluation=Evaluation(every=100, rows=16, needles=8, old_context=8_192),
        checkpoints=Checkpoints(every=50),
    )


def lm_128k() -> Run:
    """A language model of 1.3 billion weights on rows of 131,072 tokens, for 16 TPU v5e (v5e:4x4).

    Needs: long texts and a tokenizer; the weights are counted with 32,768 tokens. 5.0 of each device's
    15.75 GiB as compiled (docs/devices.md).
    Expect: 2.6 billion tokens; chunks of 4,096 tokens grow to whole rows.
    """
    parent = lm_8k()
    return replace(
        parent,
        name="lm-128k",
        model=replace(
            parent.model,
            layers=24,
            width=2_048,
            heads=16,
            kv_heads=8,
            hidden=5_632,
            rope_theta=5_000_000.0,
        ),
        data=replace(parent.data, length=131_072, batch=1),
        optimizer=replace(parent.optimizer, learning_rate=3e-4, accumulate=1, ema=None),
        curriculum=Curriculum(start=4_096, multiple_of=512),
        evaluation=replace(parent.evaluation, rows=8),
        mesh=Mesh(context=16),
    )


def lm_1m_v5p() -> Run:
    """A language model of 7 billion weights on rows of 1,048,576 tokens, for 256 TPU v5p (v5p:8x8x4).

    Needs: texts as long as books, and a tokenizer; the weights are counted with 32,768 tokens. 13.6 of each
    device's 95.7 GiB as compiled (docs/devices.md): there is room for a larger model.
    Expect: 4 million tokens a step; chunks of 8,192 tokens grow to whole rows.
    """
    parent = lm_128k()
    return replace(
        parent,
        name="lm-1m-v5p",
        steps=5_000,
        model=replace(
            parent.model,
            layers=32,
            width=4_096,
            heads=32,
            kv_heads=8,
            hidden=14_336,
            rope_theta=50_000_000.0,
        ),
        data=replace(parent.data, length=1_048_576, batch=4),
        curriculum=Curriculum(start=8_192, multiple_of=512),
        evaluation=replace(parent.evaluation, needles=0),
        mesh=Mesh(fsdp=4, context=64),
    )


def lm_1m_v6e() -> Run:
    """lm-1m-v5p for 256 TPU v6e (v6e:16x16), whose memory is a third of a v5p's.

    Needs: texts as long as books, and a tokenizer; the weights are counted with 32,768 tokens. 7.1 of each
    device's 31.25 GiB as compiled (docs/devices.md).
    Expect: 1 million tokens a step, heads and features over 4 devices each.
    """
    parent = lm_1m_v5p()
    return replace(
        parent,
        name="lm-1m-v6e",
        steps=20_000,
        data=replace(parent.data, batch=1),
        mesh=Mesh(context=64, tensor=4),
    )


PRESETS = {
    "run": base,
    "demo": demo,
    "lm-8k": lm_8k,
    "lm-32k": lm_32k,
    "lm-128k": lm_128k,
    "lm-1m-v5p": lm_1m_v5p,
    "lm-1m-v6e": lm_1m_v6e,
    "extend": extend,
    "summarize": summarize,
}
"""Name -> function that makes the `Run`."""

TOPOLOGIES = {"v5e:4x4": "lm-128k", "v5p:8x8x4": "lm-1m-v5p", "v6e:16x16": "lm-1m-v6e"}
"""Topology -> the preset made for it."""
