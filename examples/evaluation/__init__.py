"""The parts of evaluate.py: models with options, data sets, costs, results."""
