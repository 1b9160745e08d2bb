"""Evaluation as the field does it.

likelihood.py  log-likelihoods of continuations, many together, their common beginnings computed once
tasks.py       multiple choice and last words (HellaSwag's and LAMBADA's shapes) from JSONL, with standard errors
quality.py     what int8 costs on a text: the engine against the source of its file in float32
lm_eval.py     a model class for lm-evaluation-harness, with the same likelihoods (extra pyengine-lm[eval])
"""
