"""Which settings decide what a model learns: a checkpoint of other values can't be resumed.

    lineage_settings(TrainSettings(max_steps=7))["learning_rate"]     # 0.0003; max_steps is not among them

Each setting says so itself (`raytrain.settings.Setting.lineage`).
"""

from __future__ import annotations

from raytrain.settings import Setting, facts_of


def lineage_settings(settings: object) -> dict[str, object]:
    """The values of a settings dataclass that belong to the lineage, by name, in the order of its fields."""
    facts = facts_of(type(settings))
    return {name: getattr(settings, name) for name, fact in facts.items() if _is_lineage(fact.setting)}


def _is_lineage(setting: Setting | None) -> bool:
    # A setting that says nothing counts: training anew is the safe side.
    return setting is None or setting.lineage is not False
