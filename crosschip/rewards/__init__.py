"""Verifiable rewards for reinforcement learning: checkers, their errors, and the sandbox for code. No torch."""

from crosschip.rewards.attempt import FULL_REWARD, Attempt, Checker, RewardTerm, Verdict
from crosschip.rewards.checkers import CHECKERS, find_checker
from crosschip.rewards.rewarder import Rewarder

__all__ = ["CHECKERS", "FULL_REWARD", "Attempt", "Checker", "RewardTerm", "Rewarder", "Verdict", "find_checker"]
