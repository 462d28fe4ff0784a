"""The documents of a run folder: what is written is what is read."""

from dataclasses import replace

import numpy as np

from raytrain.lengths import BucketSettings, LengthHistogram, make_plan
from raytrain.run_folder.documents import PLAN_FORMAT, PlanBody
from raytrain.storage.artifacts import read_json, write_json


def test_a_plan_with_an_empty_bucket_is_read_as_it_was_written(tmp_path):
    lengths = np.array([[1000, 10], [2000, 20], [3000, 30]])
    plan = make_plan(LengthHistogram.from_lengths(lengths[:, 0], lengths[:, 1]), BucketSettings(), "h")
    empty = replace(plan, counts=(0, *plan.counts[1:]), duration_padding=(None, *plan.duration_padding[1:]))
    body = {"plan": empty.to_body(), "padding_by_scheme": []}
    write_json(tmp_path / "bucket_plan.json", PLAN_FORMAT, body)
    assert read_json(tmp_path / "bucket_plan.json", PLAN_FORMAT, PlanBody)["body"]["plan"] == empty.to_body()
