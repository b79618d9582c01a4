"""N dense experts become one mixture of experts (paper, section 3.2)."""
