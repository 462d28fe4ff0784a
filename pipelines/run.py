"""Job `run`: all stages that are not up to date, or only the named ones."""

from pipelines._job import main
from raytrain.stages.pipeline import STAGE_NAMES

if __name__ == "__main__":
    main(*STAGE_NAMES, description="Run all stages that are not up to date, or only the named ones.", choose=True)
