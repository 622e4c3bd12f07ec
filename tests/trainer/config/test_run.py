"""What a config refuses, and how it is compared with a saved one."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from slow import mostly

from dynmask_jax import Tokens, plan
from train.config.model import RopeScaling
from train.config.operation import Checkpoints, Evaluation, Generation, Watch
from train.config.presets import PRESETS
from train.config.run import Run, differences, from_json, option_values, to_json
from train.config.sections import Curriculum, Data, Lora, Loss, Model, Optimizer, Summarize
from train.step.curriculum import growth


@pytest.mark.parametrize(
    ("section", "field", "value", "words"),
    [
        (Model, "width", 36, r"model\.width must be a multiple of 2 \* model\.heads \(8\).*got 36"),
        (Model, "kv_heads", 3, r"model\.kv_heads must divide model\.heads \(4\), got 3"),
        (
            Model,
            "backend",
            "cuda",
            r"model\.backend must be one of dense, xla, xla_wide, tpu, gpu, got 'cuda'",
        ),
        (Model, "rope_theta", 0.0, r"model\.rope_theta must be positive, got 0\.0"),
        (Model, "dtype", "float16", r"model\.dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        (Model, "remat", "some", r"model\.remat must be one of 'none', 'full', .*got 'some'"),
        (Model, "bias", "rope", r"model\.bias must be one of 'none', 'alibi', got 'rope'"),
        (
            Model,
            "attention_dropout",
            1.0,
            r"model\.attention_dropout must lie in 0…1 \(1 excluded\), got 1\.0",
        ),
        (Model, "attention_dropout", -0.1, r"model\.attention_dropout must lie in 0…1 .*, got -0\.1"),
        (Model, "attention_dropout", math.nan, r"model\.attention_dropout must lie in 0…1 .*, got nan"),
        (Model, "pattern", ("near",), r"model\.pattern must be of 'global' and 'local', got \('near',\)"),
        (Model, "pattern", (), r"model\.pattern must be of 'global' and 'local', got \(\)"),
        (Model, "head_dim", 7, r"model\.head_dim must be even, got 7"),
        (Model, "vocab_size", 0, r"model\.vocab_size must be at least 1, got 0"),
        (Model, "activation", "relu", r"model\.activation must be one of 'silu', 'gelu_tanh', got 'relu'"),
        (Model, "norm_eps", 0.0, r"model\.norm_eps must be positive, got 0\.0"),
        (Model, "logits_soft_cap", -1.0, r"model\.logits_soft_cap must be positive, got -1\.0"),
        (Model, "rope_local_theta", 0.0, r"model\.rope_local_theta must be positive, got 0\.0"),
        (Model, "rope_theta", math.inf, r"model\.rope_theta must be finite, got inf"),
        (Model, "rope_local_theta", math.inf, r"model\.rope_local_theta must be finite, got inf"),
        (RopeScaling, "factor", math.inf, r"model\.rope_scaling\.factor must be finite, got inf"),
        (RopeScaling, "kind", "dynamic", r"model\.rope_scaling\.kind must be one of .*got 'dynamic'"),
        (RopeScaling, "factor", 0.5, r"model\.rope_scaling\.factor must be at least 1, got 0\.5"),
        (RopeScaling, "kind", "yarn", r"original_max_position_embeddings must be given for the kind yarn"),
        (
            RopeScaling,
            "beta_slow",
            40.0,
            r"scaling\.beta_fast must be above beta_slow \(40\.0\), got 32",
        ),
        (Model, "layers", 0, r"model\.layers must be at least 1, got 0"),
        (Model, "local_window", 0, r"model\.local_window must be at least 1, got 0"),
        (Data, "length", 1, r"data\.length must be at least 2, got 1"),
        (Data, "held_out", 1.0, r"data\.held_out must lie between 0 and 1, got 1\.0"),
        (Data, "rows", "padded", r"data\.rows must be one of 'packed', 'chunked', got 'padded'"),
        (Data, "packing_bins", 0, r"data\.packing_bins must be at least 1, got 0"),
        (Data, "columns", {"body": "text"}, r"columns of text, document and summary, got one for 'body'"),
        (Summarize, "prefix", "both", r"summarize\.prefix must be one of 'bidirectional', 'causal'"),
        (Summarize, "lead", 0, r"summarize\.lead must be at least 1, got 0"),
        (Summarize, "template", "{document}", r"template must be chat, or a text .*got '{document}'"),
        (Summarize, "template", "{summary} of {document}", r"summarize\.template must be chat, or"),
        (Summarize, "template", "{document} {summary}", r"with more than spaces between them, {summary}"),
        (Summarize, "template", "{document}: {summary}{document}", r"each once, got"),
        (Loss, "chunk", 0, r"loss\.chunk must be at least 1, got 0"),
        (Loss, "z", -1.0, r"loss\.z must be at least 0, got -1\.0"),
        (Loss, "z", math.nan, r"loss\.z must be at least 0, got nan"),
        (Optimizer, "accumulate", 0, r"optimizer\.accumulate must be at least 1, got 0"),
        (Optimizer, "ema", 1.0, r"optimizer\.ema must lie between 0 and 1, got 1\.0"),
        (
            Optimizer,
            "train",
            ("attention", "head"),
            r"optimizer\.train must name .* of embedding, .*got 'head'",
        ),
        (
            Optimizer,
            "frozen",
            ("lm_head",),
            r"optimizer\.frozen must name some of .*, logits, .*got 'lm_head'",
        ),
        (Lora, "rank", -1, r"lora\.rank must be at least 0, got -1"),
        (Lora, "alpha", 0.0, r"lora\.alpha must be positive, got 0\.0"),
        (Lora, "targets", ("q",), r"lora\.targets must name some of query, key, value, .*, down, got 'q'"),
        (Optimizer, "give_up", 0, r"optimizer\.give_up must be at least 1, got 0"),
        (Evaluation, "rows", 0, r"evaluation\.rows must be at least 1, got 0"),
        (Evaluation, "needles", -1, r"evaluation\.needles must be at least 0, got -1"),
        (Generation, "tokens", 0, r"generation\.tokens must be at least 1, got 0"),
        (Generation, "temperature", -0.1, r"generation\.temperature must be at least 0, got -0\.1"),
        (Generation, "top_k", 5, r"generation\.top_k needs a generation\.temperature above 0"),
        (Generation, "top_p", 0.9, r"generation\.top_p needs a generation\.temperature above 0"),
        (Generation, "top_k", 0, r"generation\.top_k must be at least 1, got 0"),
        (Generation, "top_p", 0.0, r"generation\.top_p must lie in 0…1 \(0 excluded\), got 0\.0"),
        (Checkpoints, "keep", 0, r"checkpoints\.keep must be at least 1, got 0"),
        (Checkpoints, "keep_every", 0, r"checkpoints\.keep_every must be at least 1, got 0"),
        (Watch, "log_every", 0, r"watch\.log_every must be at least 1, got 0"),
        (Watch, "peak_flops", 0.0, r"watch\.peak_flops must be positive, got 0\.0"),
        (Optimizer, "learning_rate", 0.0, r"optimizer\.learning_rate must be positive, got 0\.0"),
        (Optimizer, "warmup", 1.0, r"optimizer\.warmup must lie in 0…1 \(1 excluded\), got 1\.0"),
        (Optimizer, "final", 1.5, r"optimizer\.final must lie in 0…1, got 1\.5"),
        (Optimizer, "beta2", 1.0, r"optimizer\.beta2 must lie between 0 and 1, got 1\.0"),
        (Curriculum, "kind", "windows", r"curriculum\.kind must be one of 'full', 'static', .*got 'windows'"),
        (Curriculum, "schedule", "fast", r"curriculum\.schedule must be one of 'linear', .*got 'fast'"),
        (Curriculum, "order", "newest", r"curriculum\.order must be one of 'nearest', .*got 'newest'"),
        (Curriculum, "share", 0.0, r"curriculum\.share must lie in 0…1 \(0 excluded\), got 0\.0"),
        (Curriculum, "end", 16, r"curriculum\.end must be at least start \(32\), got 16"),
        (Curriculum, "pace", "fast", r"curriculum\.pace must be one of 'steps', 'loss', got 'fast'"),
        (Curriculum, "tolerance", -0.1, r"curriculum\.tolerance must be at least 0, got -0\.1"),
        (Run, "steps", 0, r"steps must be at least 1, got 0"),
        (Run, "name", "a/b", r"name must be one folder's name, without separators, got 'a/b'"),
        (Run, "name", "..", r"name must be one folder's name, without separators, got '\.\.'"),
        (Run, "task", "translate", r"task must be one of 'lm', 'summarize', got 'translate'"),
        (
            Run,
            "optimizer",
            Optimizer(accumulate=2),
            r"data\.batch must be a multiple of .*accumulate \(2\), got 1",
        ),
        (Run, "watch", Watch(profile=1_000), r"watch\.profile must be below steps \(1000\), got 1000"),
        (Run, "curriculum", Curriculum(pace="loss"), r"pace loss needs evaluation\.every above 0"),
        (Run, "data", Data(length=16), r"curriculum\.start and end must not exceed data\.length \(16\)"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(section, field, value, words):
    with pytest.raises(ValueError, match=words):
        section(**{field: value})


def test_a_pace_by_loss_that_may_end_before_the_full_mask_is_refused():
    pace = Curriculum(pace="loss", stages=8, patience=4)
    words = r"stages \* patience \* evaluation\.every = 320 steps .*more than the run's steps \(300\)"
    with pytest.raises(ValueError, match=words):
        Run(steps=300, curriculum=pace, evaluation=Evaluation(every=10))
    Run(steps=320, curriculum=pace, evaluation=Evaluation(every=10))


def test_pairs_cannot_be_cut_into_chunked_rows():
    with pytest.raises(ValueError, match=r"data\.rows must be packed for the task summarize, got 'chunked'"):
        Run(task="summarize", data=Data(rows="chunked"))


def test_a_window_that_multiple_of_does_not_divide_is_refused_by_name():
    run = Run(curriculum=Curriculum(start=32, multiple_of=24))
    with pytest.raises(ValueError, match=r"curriculum\.start must be a multiple of .*\(24\), got 32"):
        growth(run)


def test_a_saved_config_equals_the_run_it_was_saved_from():
    run = Run(data=Data(paths=("a.txt", "b")))
    assert differences(json.loads(to_json(run)), run) == []


def test_a_run_comes_back_from_its_json():
    run = Run(
        task="summarize",
        data=Data(paths=("a.jsonl", "b"), columns={"summary": "abstract"}),
        model=Model(layers=6, pattern=("local", "local", "global"), bias="alibi", attention_dropout=0.1),
        optimizer=Optimizer(ema=0.99),
    )
    assert from_json(to_json(run)) == run


def test_a_config_older_than_bias_and_dropout_has_none():
    saved = json.loads(to_json(Run()))
    del saved["model"]["bias"], saved["model"]["attention_dropout"]
    assert from_json(json.dumps(saved)) == Run()
    assert differences(saved, Run(model=Model(bias="alibi", attention_dropout=0.1))) == [
        "model.attention_dropout: 0.0 saved, 0.1 asked for",
        "model.bias: 'none' saved, 'alibi' asked for",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "sm', "Unterminated string"),
        ("[1]", "it holds list, not an object"),
        ('{"model": {"depth": 3}}', "Model has no option 'depth'"),
        ('{"model": {"layers": 0}}', r"model\.layers must be at least 1, got 0"),
        ('{"model": 3}', r"model must be an object, got 3"),
    ],
)
def test_json_that_is_no_run_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        from_json(text)


def test_what_no_weight_depends_on_may_differ():
    saved = json.loads(to_json(Run()))
    other = replace(
        Run(),
        name="moved",
        folder="elsewhere",
        generation=Generation(tokens=3),
        checkpoints=Checkpoints(keep=7),
        watch=Watch(log_every=5),
    )
    assert differences(saved, other) == []
    assert differences(saved, replace(other, steps=7)) == ["steps: 1000 saved, 7 asked for"]


def test_differences_name_the_field_and_both_values():
    saved = json.loads(to_json(Run()))
    saved["model"]["layers"] = 7
    del saved["seed"]
    assert differences(saved, Run()) == ["model.layers: 7 saved, 4 asked for"], "0 is the seed's default"
    assert differences(saved, Run(seed=1))[1:] == ["seed: 0 saved, 1 asked for"]
    saved["other"] = 3
    assert differences(saved, Run())[1:] == ["other: 3 saved, 'nothing' asked for"]


def test_a_run_whose_columns_are_named_is_the_same_run():
    named = Run(data=Data(columns={"text": "document"}))
    saved = json.loads(to_json(named))
    assert differences(saved, named) == []
    assert differences(saved, Run()) == ["data.columns.text: 'document' saved, 'nothing' asked for"]
    assert differences(json.loads(to_json(Run())), named) == [
        "data.columns.text: 'nothing' saved, 'document' asked for"
    ]


def test_a_run_may_have_more_steps_than_it_had_and_not_fewer():
    saved = json.loads(to_json(Run(steps=8)))
    assert differences(saved, Run(steps=9)) == []
    assert differences(saved, Run(steps=7)) == ["steps: 8 saved, 7 asked for"]


def test_every_field_is_an_option():
    names = list(option_values(Run()))
    assert names[0] == "name"
    assert {"steps", "model.kv_heads", "data.paths", "data.columns", "optimizer.clip", "watch.wandb"} < set(
        names
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_say_what_they_are(name):
    preset = PRESETS[name]
    assert growth(preset()).window(0) >= 1
    assert preset.__doc__


@pytest.mark.parametrize("name", mostly(PRESETS, [name for name in PRESETS if "-1m" not in name]))
def test_the_curriculum_of_a_preset_saves_blocks(name):
    """Of a row's one long document, which begins where no chunk does: at its start, and half of the way."""
    run = PRESETS[name]()
    grown, length = growth(run), run.data.length
    summary = 300 if run.task == "summarize" else 0
    tokens = Tokens(
        jnp.arange(length - 101, dtype=jnp.int32) + (101 + summary if run.task == "summarize" else 0),
        jnp.ones(length - 101, jnp.int32),
    )

    @jax.jit
    def blocks(clock):
        return plan(grown.mask(clock), tokens, block_q=128, block_k=128).active

    start, middle, end = (int(blocks(jnp.int32(grown.steps * share // 100))) for share in (0, 50, 100))
    assert start < 0.4 * end
    assert middle < 0.95 * end
