"""The experts of a layer: routing, the grouped GEMMs, and the plan that turns operator arguments into launches."""
