"""From a model to a `.pte` + `.ptd` pair and its generated text.

An export reads in this order: `options` (what to export), `build` and `checkpoint` (the model with packed experts),
`models.causal_lm` (two methods on one KV cache), `pipeline` (the steps), `report` (summary, record and metadata).
`check` checks an export without making it; `generate` and `bench` run artifacts; `cli` is the command line.
"""
