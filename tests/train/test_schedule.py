import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosschip.recipe import StageSettings
from crosschip.train.schedule import learning_rate_at


def stage(**settings: object) -> StageSettings:
    return StageSettings.model_validate({"steps": 100, "learning_rate": 1.0, "warmup_steps": 10, **settings})


def test_warmup_rises_linearly_to_the_full_rate() -> None:
    assert [learning_rate_at(step, stage()) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_cosine_is_halfway_down_in_the_middle_and_at_its_share_at_the_end() -> None:
    settings = stage(final_learning_rate_share=0.2)
    assert learning_rate_at(55, settings) == pytest.approx(0.6)
    assert learning_rate_at(100, settings) == pytest.approx(0.2)


def test_wsd_stays_and_then_falls_linearly() -> None:
    settings = stage(schedule="wsd", decay_share=0.2, final_learning_rate_share=0.0)
    assert [learning_rate_at(step, settings) for step in (11, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_without_warmup_the_first_step_has_a_rate() -> None:
    assert 0.9 < learning_rate_at(1, stage(warmup_steps=0)) < 1.0
    assert learning_rate_at(1, stage(warmup_steps=0, schedule="wsd")) == 1.0


@given(
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "wsd"]),
    decay_share=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_every_rate_is_between_nothing_and_the_full_one(
    steps: int, warmup_share: float, schedule: str, decay_share: float, final: float
) -> None:
    warmup = min(int(steps * warmup_share), steps - 1)
    settings = stage(
        steps=steps,
        warmup_steps=warmup,
        schedule=schedule,
        decay_share=decay_share,
        final_learning_rate_share=final,
    )
    rates = [learning_rate_at(step, settings) for step in range(1, steps + 1)]
    assert all(0.0 <= rate <= 1.0 + 1e-12 for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after)), "it only falls"
