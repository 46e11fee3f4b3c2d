"""From a model to a `.pte` + `.ptd` pair and its generated text."""
