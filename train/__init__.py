"""The trainer: language models on long text under a mask curriculum. `python -m train --help`.

Its files, the way that a run goes through them:

    __main__, commands      what is typed          presets, config, sections, checks   what a run is
    sources, columns, records, tokenizers, token_writer, token_cache                   paths to tokens
    split, rows, pipeline, data, batch                                                 tokens to batches
    curriculum, pace, exposure                                                         what is shown
    model, loss, optimizer, step                                                       one train step
    loop, folder, checkpoint, checksums, signals, disk                                 all of them, and again
    evaluation, needle                                                                 what was learned
    metrics, sinks, flops, profile                                                     what is watched
    finish, summary, picture, report, markdown, command_line                           what it came to
    trained, generation, sampling, summaries, rouge, weights                           what it is good for
"""
