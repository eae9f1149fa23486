"""Turn text into packed samples: documents -> tokenizer -> token store (.bin/.idx) -> stream of samples -> batches.

`config` holds the options, `prepare` makes the token store once per corpus, `stream` cuts it into samples by a global
sample index, and `batches` says which sample indices a rank takes at a step.
"""
