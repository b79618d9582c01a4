"""``btx compare``: variants of one recipe, trained, measured and held against each other."""
