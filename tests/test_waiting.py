"""A long wait is reported, a short one is not."""

import time

from raytrain import waiting


def test_long_waits_say_what_for_and_short_ones_nothing(capfd):
    with waiting.reporting_wait("a train", after=0.1, interval=0.1):
        time.sleep(0.35)
    output = capfd.readouterr().err
    assert output.startswith("  waiting for a train; 0 s so far\n") and output.count("\n") >= 2
    with waiting.reporting_wait("nothing", after=5):
        pass
    time.sleep(0.05)
    assert not capfd.readouterr().err


def test_items_that_are_long_in_coming_are_told_of(capfd, monkeypatch):
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.3)

    def items():
        yield 1
        time.sleep(0.9)
        yield 2

    assert list(waiting.report_waits(items(), lambda: "the second")) == [1, 2]
    assert capfd.readouterr().err.count("waiting for the second") == 1


def test_a_question_that_fails_ends_nothing(capfd):
    with waiting.reporting_wait(lambda: 1 / 0, after=0.05):
        time.sleep(0.15)
    assert not capfd.readouterr().err
