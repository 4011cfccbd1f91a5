"""What the demo says of its own outcome; its jobs are tested one by one, and `make demo` runs them all."""

from pipelines import demo


def report(oracle: float) -> dict:
    return {"methods": {"oracle": {"scores": {"accuracy": oracle}}}, "reference": {"best_with_history": 0.98}}


def test_a_base_lm_that_cannot_use_a_stated_preference_is_a_failure():
    assert demo.weakness(report(0.95)) is None
    assert "accuracy 0.659, possible 0.980" in (demo.weakness(report(0.659)) or "")
