"""Which settings determine what a model learns: training can't resume from a checkpoint with other values.

    lineage_settings(TrainSettings(max_steps=7))["learning_rate"]     # 0.0003; max_steps is not among them

Each setting declares this itself (`raytrain.settings.Setting.lineage`).
"""

from __future__ import annotations

from raytrain.settings import Setting, facts_of


def lineage_settings(settings: object) -> dict[str, object]:
    """The values of a settings dataclass that belong to the lineage, by name, in the order of its fields."""
    facts = facts_of(type(settings))
    return {name: getattr(settings, name) for name, fact in facts.items() if _is_lineage(fact.setting)}


def _is_lineage(setting: Setting | None) -> bool:
    # A setting without a declaration counts: retraining is the safe choice.
    return setting is None or setting.lineage is not False
