"""Rows of the plan's page about engines: serving, rollouts, and groups on several clusters."""

from __future__ import annotations

from typing import Any

from crosschip.report.figures import count, duration, percent

__all__ = ["joined_rows", "rollout_rows", "serving_rows"]


def serving_rows(serving: dict[str, Any]) -> list[tuple[str, str]]:
    """Load, prefill, decode, answers and what the chips cost."""
    load, prefill, decode = serving["load"], serving["prefill"], serving["decode"]
    rows = [
        ("load (given)", f"{load['requests_per_s']:g} requests/s"),
        ("tokens a request (given)", f"{load['prompt_tokens']:g} in, {load['answer_tokens']:g} out"),
        (
            "prefill (computed)",
            f"{prefill['instances']} × {prefill['chips_per_instance']} chips, {percent(prefill['busy'])} busy; first "
            f"token after {prefill['first_token_s']:.3g} s (P95; promised {load['first_token_s']:g} s)",
        ),
        (
            "decode (computed)",
            f"{decode['instances']} × {decode['chips_per_instance']} chips, {decode['batch']} sequences each; "
            f"{1000 * decode['token_s']:.3g} ms a token (promised {1000 * load['token_s']:g} ms), "
            f"bound by {decode['bound_by']}",
        ),
        (
            "answers (computed)",
            f"{serving['answer_s']:.3g} s each; {count(serving['answer_tokens_per_s'])} tokens/s in all",
        ),
    ]
    cost, there = serving.get("cost"), serving.get("there")
    if cost:
        rows.append(("cost (computed)", f"{count(cost['per_day'])} {cost['currency']} a day"))
    if there is not None and there < serving["chips"]:
        rows.append(("chips that are there", f"{count(there)} of {count(serving['chips'])}: too few for this load"))
    return rows


def rollout_rows(rollouts: dict[str, Any]) -> list[tuple[str, str]]:
    """Who answers, how fast, and what a batch of rollouts takes beside the learning."""
    turns = "beside the learning" if rollouts["overlapped"] else "in turns with the learning"
    return [
        (
            "engines (computed)",
            f"{count(rollouts['instances'])} × {rollouts['chips_per_instance']} {rollouts['chip']}, "
            f"{rollouts['sequences_per_instance']} sequences each; {turns}",
        ),
        (
            "a batch",
            f"{count(rollouts['answers_per_batch'])} answers of {rollouts['tokens_per_answer']:g} tokens; "
            f"{count(rollouts['batches'])} batches",
        ),
        ("tokens written (computed)", f"{count(rollouts['tokens_per_s']['value'])} a second"),
        ("answering a batch (computed)", duration(rollouts["rollout_s"]["value"])),
        ("learning from it (computed)", duration(rollouts["learning_s"]["value"])),
    ]


def joined_rows(joined: dict[str, Any]) -> list[tuple[str, str]]:
    """Each group's speed alone, what they reach together, and what the link takes."""
    rows = [
        (
            f"{each['cluster']} (computed)",
            f"{count(each['num_chips'])} {each['chip']}, {count(each['tokens_per_s']['value'])} tokens/s alone",
        )
        for each in joined["groups"]
    ]
    exchange, between = joined["exchange_s"]["value"], joined["between_exchanges_s"]["value"]
    return [
        *rows,
        (
            "together (computed)",
            f"{count(joined['tokens_per_s']['value'])} tokens/s, {percent(joined['utilisation']['value'])} of the sum",
        ),
        ("an exchange (computed)", f"{duration(exchange)} on the link, every {duration(between)}"),
        (
            "batch divided by speed (computed)",
            f"{count(joined['divided_by_speed_tokens_per_s']['value'])} tokens/s would be reached",
        ),
    ]
