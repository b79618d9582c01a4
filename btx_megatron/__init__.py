"""Branch-Train-MiX (arXiv 2403.07816) on Megatron-Core: from one seed model to a mixture of experts."""

__version__ = "0.1.0"
