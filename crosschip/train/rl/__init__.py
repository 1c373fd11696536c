"""Reinforcement learning with verifiable rewards: rollouts over HTTP, GRPO, and the measured mismatch of the two."""
