"""Job `report`: write report.html from the run folder."""

from pipelines._job import main

if __name__ == "__main__":
    main("report", description="Write report.html from the run folder.")
