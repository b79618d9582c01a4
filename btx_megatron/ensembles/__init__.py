"""Experts that stay apart and answer together: BTM, c-BTM, TiMoE."""
