"""The trainer: language models on long text under a mask curriculum. `python -m train --help`.

Its files, the way that a run goes through them:

    __main__, commands      what is typed          presets, config, sections, checks   what a run is
    sources, columns, records, tokenizers, token_writer, token_cache                   paths to tokens
    split, rows, pipeline, data, batch                                                 tokens to batches
    curriculum, pace, exposure                                                         what is shown
    sharding, gathering, torus, layout                                                 what lies where
    model, loss, optimizer, state, step                                                one train step
    joining, distributed                                                               processes together
    session, loop, folder, checkpoint, checksums, signals, disk                        all steps, and again
    evaluation, needle                                                                 what was learned
    metrics, sinks, flops, profile                                                     what is watched
    finish, summary, picture, report, markdown, command_line                           what it came to
    trained, generation, sampling, summaries, rouge, weights                           what it is good for
    compiling, topology, compiled, scheduled, transfers                                a TPU that is not there
"""
