"""How much of training each corpus gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def sampling_shares(
    hours: Sequence[float], weights: Sequence[float], temperature: float = 1.0, groups: Sequence[str] | None = None
) -> list[float]:
    """Shares ∝ weight · hours · H^(1/temperature − 1), with sum 1, where H is the hours of the corpus' group.

    Without `groups` each corpus is its own: weight · hours^(1/temperature). Temperature 1 keeps the corpora's own
    proportions, and a larger one brings groups (languages, say) nearer to each other, as is usual in multilingual
    training (Conneau & Lample, arXiv 1901.07291, who give the exponent). A corpus without hours gets none.
    """
    names = list(range(len(hours))) if groups is None else list(groups)
    total_of: Counter = Counter()
    for name, hour in zip(names, hours, strict=True):
        total_of[name] += hour
    masses = [
        weight * hour * total_of[name] ** (1 / temperature - 1) if hour > 0 else 0.0
        for name, hour, weight in zip(names, hours, weights, strict=True)
    ]
    total = sum(masses)
    return [mass / total if total else 0.0 for mass in masses]
