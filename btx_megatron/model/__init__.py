"""Recipe to Megatron-Core model: dense seed and experts, and the mixture of experts."""
