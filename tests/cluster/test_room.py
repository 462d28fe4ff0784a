"""Room for training workers: how many to start, and what is waited for."""

import pytest

from raytrain.cluster.room import Room, choose_workers, waiting_for
from raytrain.errors import TrainingError

EACH = "1 CPU, 1 GPU"


@pytest.mark.parametrize(
    ("wanted", "room", "workers"),
    [
        (2, Room(2, 2, 2), 2),
        (2, Room(8, 8, 8), 2),  # more GPUs than workers
        ((1, 2), Room(1, 1, 1), (1, 2)),  # Ray Train takes the one there is
        ((1, 2), Room(4, 4, 4), (1, 2)),
        ((3, 3), Room(4, 4, 4), 3),
        (4, Room(0, 0, 8), 4),  # the autoscaler adds nodes
        ((2, 8), Room(0, 0, 4), (2, 8)),
        ((1, 2), Room(1, 1, 1, strays=True), 1),  # Ray Train would count nodes without the labels
        ((1, 8), Room(3, 3, 3, strays=True), 3),
    ],
)
def test_a_range_takes_what_there_is(wanted, room, workers):
    assert choose_workers(wanted, room, EACH) == workers


@pytest.mark.parametrize(
    ("wanted", "room"), [(2, Room(1, 1, 1)), ((2, 4), Room(1, 1, 1)), (9, Room(0, 0, 8)), (1, Room(0, 0, 0))]
)
def test_too_little_room_is_an_error_before_anything_waits(wanted, room):
    with pytest.raises(TrainingError, match=rf"that many training workers.*\({EACH} each\).*lower train.num_workers"):
        choose_workers(wanted, room, EACH)


def test_a_range_on_nodes_that_are_to_come_needs_a_resource():
    with pytest.raises(TrainingError, match="nodes without cluster.train_labels"):
        choose_workers((2, 4), Room(0, 0, 8, strays=True), EACH)


@pytest.mark.parametrize(
    ("wanted", "room", "line"),
    [
        (2, Room(2, 2, 2), None),
        ((1, 4), Room(2, 1, 2), None),
        (2, Room(1, 1, 8), "waiting for nodes: 2 workers (1 CPU, 1 GPU each), the cluster has room for 1 so far"),
        (2, Room(4, 1, 4), "waiting for other work to end: 2 workers (1 CPU, 1 GPU each), there is room for 1 now"),
    ],
)
def test_a_wait_says_what_for(wanted, room, line):
    assert waiting_for(wanted, room, EACH) == line
