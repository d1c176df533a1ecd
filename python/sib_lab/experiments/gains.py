"""What several comparisons show together: gains of one training method over another, paired by seeds."""

import math
from collections.abc import Mapping, Sequence

from ..explaining import methods as explain
from ..explaining.statistics import Difference, paired_difference
from ..reporting import results
from ..reporting.results import EMPTY

#: training method -> seed -> key -> {"mean": ...}
Numbers = Mapping[str, Mapping[int, Mapping[str, dict]]]


def numbers_of(found: dict) -> dict[str, dict[int, dict]]:
    """The numbers of every run in the content of a results.json."""
    return {
        method: {run["seed"]: run["numbers"] for run in found["runs"] if run["method"] == method}
        for method in found["methods"]
    }


def gain(numbers: Numbers, keys: Sequence[str], method: str, over: str) -> Difference:
    """Of the mean of some numbers, a method's less another's; a seed in which one is undefined is left out."""
    both = [seed for seed in numbers[method] if seed in numbers[over]]
    sides = (
        [results.tensor([numbers[of][seed][key]["mean"] for key in keys]).mean().item() for seed in both]
        for of in (over, method)
    )
    return paired_difference(*sides)


def gains_of_six(numbers: Numbers, measure: str, method: str, over: str) -> dict[str, Difference]:
    """The gain in each of the six explanations."""
    return {name: gain(numbers, [f"{measure}/{name}"], method, over) for name in explain.SIX}


def worst(gains: Mapping[str, Difference]) -> str:
    """The explanation with the lowest gain; one that is undefined is the worst."""
    return min(gains, key=lambda name: gains[name].mean if math.isfinite(gains[name].mean) else -math.inf)


def as_differences(gains: Mapping[str, Difference]) -> dict[str, dict]:
    return {name: results.as_difference(value) for name, value in gains.items()}


def most_empty(of_seeds: Sequence[dict]) -> dict[str, float]:
    """Of each of the six explanations: the empty ones of 100 (finite) maps, in the seed that has the most."""
    return {
        name: max(round(100 * (numbers[f"{EMPTY}/{name}"]["mean"] or 0), 6) for numbers in of_seeds)
        for name in explain.SIX
    }


def means_of(numbers: Numbers) -> dict[str, dict[int, dict[str, float | None]]]:
    """Method -> seed -> key -> mean alone."""
    return {
        method: {seed: {key: value["mean"] for key, value in of.items()} for seed, of in of_seeds.items()}
        for method, of_seeds in numbers.items()
    }


def starred(value: dict) -> str:
    """A difference for people, with * where its interval excludes zero."""
    return results.difference(value) + ("*" if value["excludes_zero"] else "")


def yes(reached: bool | None) -> str:
    return "reached" if reached else "of one training" if reached is None else "not reached"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
