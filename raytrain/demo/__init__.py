"""The demo: a corpus made on the spot, and the whole pipeline run over it."""
