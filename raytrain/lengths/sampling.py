"""How much of training each corpus gets."""

from __future__ import annotations

from collections.abc import Sequence


def sampling_shares(hours: Sequence[float], weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Shares ∝ weight · hours^(1/temperature), with sum 1; a corpus without hours gets none.

    Temperature 1 keeps the corpora's own proportions, and a larger one brings them nearer to each other, as is usual in
    multilingual training (Conneau & Lample, arXiv 1901.07291, who give the exponent).
    """
    masses = [
        weight * hour ** (1 / temperature) if hour > 0 else 0.0 for hour, weight in zip(hours, weights, strict=True)
    ]
    total = sum(masses)
    return [mass / total if total else 0.0 for mass in masses]
