"""From a model to a `.pte` + `.ptd` pair and its generated text.

An export reads in this order: `options` (what is asked for), `build` and `streaming` (the model, its experts packed;
`checkpoint` and `shards` below them), `causal_lm` (two methods on one cache), `pipeline` (the steps), `summary` and
`metadata` (what is said of it). `preflight` checks one without making it; `generation` and `benchmark` run artifacts;
`cli` is the command line.
"""
