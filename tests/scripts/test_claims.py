"""What results say about claims, on results made up here."""

from __future__ import annotations

from typing import Any

from hf_sparse.analysis.results import Result
from scripts.reference.claims import verdicts
from tests.helpers.speeds import speed_file

MOVEMENT, DISTILLED, HYBRID = (
    "movement better than magnitude at 10 % remaining or fewer",
    "distillation better than none",
    "hybrid blocks faster than unstructured sparsity at equal accuracy",
)


def result(method: str, sparsity: float, seed: int, accuracy: float, **more: Any) -> Result:
    facts: dict[str, Any] = {"name": f"{method}-{sparsity}", "task": "sst2", "model": "m", "steps": 1, **more}
    metric = "wer" if facts["task"] == "g2p" else "accuracy"
    return Result(method=method, sparsity=sparsity, seed=seed, metrics={metric: accuracy}, **facts)


def outcomes(results: list[Result], claim: str) -> list[str]:
    return [verdict.outcome for verdict in verdicts(results) if verdict.claim == claim]


def test_every_claim_without_results_is_not_measured() -> None:
    assert [verdict.outcome for verdict in verdicts([])] == ["not measured"] * 3


def test_signs_in_all_seeds_decide() -> None:
    base = [result("magnitude", 0.9, seed, 0.5) for seed in (0, 1)]
    assert outcomes([*base, result("movement", 0.9, 0, 0.6), result("movement", 0.9, 1, 0.7)], MOVEMENT) == ["shown"]
    assert outcomes([*base, result("movement", 0.9, 0, 0.4), result("movement", 0.9, 1, 0.3)], MOVEMENT) == ["refuted"]
    assert outcomes([*base, result("movement", 0.9, 0, 0.6), result("movement", 0.9, 1, 0.3)], MOVEMENT) == [
        "undecided"
    ]
    assert outcomes([*base, result("movement", 0.9, 0, 0.6)], MOVEMENT) == ["undecided"]
    assert outcomes([*base, result("movement", 0.9, 5, 0.6)], MOVEMENT) == ["not measured"]  # no seed in common
    other = [result("magnitude", 0.8, 0, 0.5), result("movement", 0.8, 0, 0.6)]
    assert outcomes(other, MOVEMENT) == ["not measured"]  # 20 % remain
    unlike = [*base, result("movement", 0.9, 0, 0.6, steps=2)]
    assert outcomes(unlike, MOVEMENT) == ["not measured"]


def test_pairs_of_other_steps_or_models_are_told_apart() -> None:
    short = [result(method, 0.9, 0, value) for method, value in (("magnitude", 0.6), ("movement", 0.5))]
    long = [
        result(method, 0.9, seed, value + seed, steps=4, name=f"{method}-long")
        for method, value in (("magnitude", 0.6), ("movement", 0.7))
        for seed in (0, 1)
    ]
    found = {verdict.where: verdict.outcome for verdict in verdicts([*short, *long]) if verdict.claim == MOVEMENT}
    assert found == {
        "movement-0.9 and magnitude-0.9": "undecided",
        "movement-long and magnitude-long": "shown",
    }


def test_five_seeds_decide_although_they_disagree() -> None:
    base = [result("magnitude", 0.9, seed, 0.5) for seed in range(5)]

    def outcome_of(*differences: float) -> tuple[str, str]:
        runs = [result("movement", 0.9, seed, 0.5 + value) for seed, value in enumerate(differences)]
        (verdict,) = [verdict for verdict in verdicts([*base, *runs]) if verdict.claim == MOVEMENT]
        return verdict.outcome, verdict.figures

    assert outcome_of(0.1, -0.01, 0.1)[0] == "undecided"
    word, figures = outcome_of(0.1, 0.2, 0.1, 0.2, -0.01)
    assert word == "shown (on average)"
    # stdev 0.08701, 2.776 standard errors of it are 0.108
    assert figures.endswith("-0.010, mean +0.118 (95 %: +0.010 to +0.226)")
    assert outcome_of(-0.1, -0.2, -0.1, -0.2, 0.01)[0] == "refuted (on average)"
    assert outcome_of(0.1, -0.1, 0.1, -0.1, 0.1)[0] == "refuted (no difference)"
    assert outcome_of(0.1, 0.1, 0.2, 0.1, 0.1)[0] == "shown"


def test_lower_error_rates_are_better() -> None:
    runs = [result(method, 0.9, seed, value, task="g2p") for seed in (0, 1) for method, value in
            (("magnitude, after dense", 0.3), ("movement, after dense", 0.2))]  # fmt: skip
    assert outcomes(runs, MOVEMENT) == ["shown"]
    (verdict,) = [verdict for verdict in verdicts(runs) if verdict.claim == MOVEMENT]
    assert verdict.figures == "wer 0.200 against 0.300; difference +0.100 +0.100"


def test_distillation_is_compared_with_the_same_method_without() -> None:
    runs = [result(method, 0.95, seed, value) for seed in (0, 1) for method, value in
            (("movement", 0.8), ("movement, taught by l6", 0.82))]  # fmt: skip
    assert outcomes(runs, DISTILLED) == ["shown"]
    assert outcomes(runs[:2], DISTILLED) == ["undecided"]


def test_hybrid_is_compared_with_the_fastest_of_equal_accuracy() -> None:
    fast, slow = speed_file(gain=3.0), speed_file(gain=1.5)
    hybrid = result("hybrid", 0.7, 0, 0.8, speed=fast)
    assert outcomes([hybrid, result("movement", 0.8, 0, 0.8, speed=slow)], HYBRID) == ["shown"]
    assert outcomes([hybrid, result("movement", 0.97, 0, 0.7, speed=speed_file(gain=9.0))], HYBRID) == ["not measured"]
    rivals = [
        result("movement", 0.8, 0, 0.8, speed=slow),
        result("magnitude", 0.9, 0, 0.799, speed=speed_file(gain=5.0)),
    ]
    assert outcomes([hybrid, *rivals], HYBRID) == ["refuted"]
    assert outcomes([hybrid, result("movement", 0.8, 0, 0.8, speed=speed_file(gain=2.9))], HYBRID) == ["undecided"]


def test_speeds_of_two_machines_are_not_compared() -> None:
    hybrid = result("hybrid", 0.7, 0, 0.8, speed=speed_file(gain=3.0))
    elsewhere = result("movement", 0.8, 0, 0.8, speed=speed_file(gain=1.5, machine="Box 10"))
    assert outcomes([hybrid, elsewhere], HYBRID) == ["not measured"]


def test_hybrid_is_compared_with_runs_as_long_that_began_alike() -> None:
    hybrid = result("hybrid", 0.7, 0, 0.8, speed=speed_file(gain=3.0))
    longer = result("movement", 0.8, 0, 0.8, speed=speed_file(gain=9.0), steps=4)
    assert outcomes([hybrid, longer], HYBRID) == ["not measured"]
    after = result("movement, after dense", 0.8, 0, 0.8, speed=speed_file(gain=1.5))
    assert outcomes([hybrid, after], HYBRID) == ["not measured"]
    gone_on = result("hybrid, after dense", 0.7, 0, 0.8, speed=speed_file(gain=3.0))
    assert outcomes([gone_on, after], HYBRID) == ["shown"]
