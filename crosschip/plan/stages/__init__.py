"""Every stage of a recipe as the planner sees it: its layout and step, its rollouts, groups on several clusters."""

from crosschip.plan.stages.planned import JoinedStage, PlannedStage, ReinforcedStage
from crosschip.plan.stages.whole import StageChoices, plan_stages, settled

__all__ = ["JoinedStage", "PlannedStage", "ReinforcedStage", "StageChoices", "plan_stages", "settled"]
