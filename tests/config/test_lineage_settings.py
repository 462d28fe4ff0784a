"""Training can resume with different settings, unless they determine what is learned."""

from dataclasses import replace

from raytrain.config.lineage import lineage_settings
from raytrain.training.settings import TrainSettings

LEARNED = {
    "precision",
    "learning_rate",
    "min_learning_rate",
    "warmup_steps",
    "schedule",
    "beta1",
    "beta2",
    "weight_decay",
    "clip_norm",
    "average_decay",
    "ctc_weight",
    "mask_prompt",
}


def test_lineage_is_what_decides_what_is_learned():
    # A change of this list makes all earlier checkpoints ones of another lineage.
    assert set(lineage_settings(TrainSettings())) == LEARNED


def test_settings_apart_from_it_leave_the_lineage_as_it_is():
    settings = TrainSettings()
    rerun = replace(settings, max_steps=7, num_workers=8, keep_best=3, device="cpu", storage_path="s3://b/c")
    assert lineage_settings(rerun) == lineage_settings(settings)
    assert lineage_settings(replace(settings, beta2=0.99)) != lineage_settings(settings)
