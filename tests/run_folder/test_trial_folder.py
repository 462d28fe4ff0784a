"""A trial's folder sees the artifacts of the run, and is the same one for the same settings and inputs."""

import pytest

from raytrain.run_folder.trial_folder import SHARED, TrialJob


@pytest.fixture
def job(tmp_path) -> TrialJob:
    run = tmp_path / "run"
    run.mkdir()
    for name in SHARED:
        (run / name).write_text(f"the run's {name}")
    return TrialJob({}, str(run), str(tmp_path / "trials"), "sqlite://")


def test_a_trial_sees_the_runs_artifacts_and_the_files_that_stand_for_some(job, tmp_path):
    sized = tmp_path / "sized.json"
    sized.write_text("other sizes")
    trial = TrialJob(**{**vars(job), "files": {"batch_profile.json": str(sized)}})
    folder = trial.folder({"train.learning_rate": 1e-4}, "lineage")
    assert sorted(path.name for path in folder.iterdir()) == sorted(SHARED)
    assert (folder / "batch_profile.json").read_text() == "other sizes"
    assert (folder / "statistics.json").read_text() == "the run's statistics.json"


def test_what_a_trial_depends_on_names_its_folder(job):
    folder = job.folder({"train.learning_rate": 1e-4}, "lineage")
    assert job.folder({"train.learning_rate": 1e-4}, "lineage") == folder
    changed_jobs = [
        job.folder({"train.learning_rate": 1e-3}, "lineage"),
        job.folder({"train.learning_rate": 1e-4}, "another"),
        TrialJob(**{**vars(job), "label": "x"}).folder({"train.learning_rate": 1e-4}, "lineage"),
    ]
    assert len({folder, *changed_jobs}) == 4


def test_a_job_is_read_from_a_json_object_that_may_hold_more(job):
    assert TrialJob.from_json({**vars(job), "scheme": "A"}) == job
