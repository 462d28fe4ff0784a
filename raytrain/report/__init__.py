"""The run's report: figures and one HTML page."""
