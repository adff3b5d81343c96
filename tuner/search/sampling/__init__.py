"""How new configurations are drawn: Optuna's samplers, a grid, and a Gaussian process with exact costs. No Ray."""
