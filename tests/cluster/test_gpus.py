"""The GPUs of a cluster as its nodes tell them; without Ray."""

from dataclasses import replace

import pytest

from raytrain.cluster import gpus
from raytrain.cluster.gpus import GpuKind, least_bytes, whole_gpus
from raytrain.cluster.nodes import NoAnswer
from raytrain.cluster.placement import Placement
from raytrain.errors import ClusterError
from raytrain.model.device import Device

GIB = 1 << 30
A100, H100 = Device("cuda", "cuda:0", "A100", 40 * GIB), Device("cuda", "cuda:0", "H100", 80 * GIB)


@pytest.fixture
def answers(monkeypatch):
    """Replaces each node's answer."""

    def set_answers(**by_node):
        monkeypatch.setattr(
            gpus, "ask_nodes", lambda function, arguments, seconds: [(node, by_node[node], 0.0) for node in arguments]
        )
        return gpus._ask_kinds({node: (2, f"host-{node}") for node in by_node})

    return set_answers


def test_a_part_of_a_gpu_is_an_error_and_not_a_processor():
    node = {"NodeID": "n", "NodeManagerHostname": "h", "Resources": {"CPU": 4.0, "GPU": 0.5}}
    with pytest.raises(ClusterError, match="0.5 GPUs on h; allowed: a whole number"):
        whole_gpus(node)
    assert whole_gpus({**node, "Resources": {"GPU": 2.0}}) == 2 and whole_gpus({**node, "Resources": {}}) == 0


def test_kinds_are_told_by_name_and_memory(answers):
    second = replace(H100, torch_name="cuda:1")
    small = replace(A100, total_bytes=20 * GIB)
    kinds = answers(a=[H100, second], b=[A100], c=[H100], d=[small])
    assert [(kind.name, kind.total_bytes // GIB, kind.nodes) for kind in kinds if kind.name == "H100"] == [
        ("H100", 80, (("a", 2), ("c", 2)))
    ]
    assert len(kinds) == 3 and least_bytes(kinds) == 20 * GIB and not any(kind.is_emulated for kind in kinds)


def test_each_gpu_is_a_place_on_its_node():
    kind = GpuKind("H100", 80 * GIB, (("a", 2), ("c", 1)))
    places = kind.placements(Placement("train", {"role": "in(train,spare)"}, {"gpu_host": 1.0}, "H100"))
    assert [place.labels["ray.io/node-id"] for place in places] == ["a", "a", "c"] and kind.num_gpus == 3
    assert all(place.labels["role"] == "in(train,spare)" and place.resources == {"gpu_host": 1.0} for place in places)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([A100, H100], r"host-n has several kinds of GPU; got A100 \(40 GiB\), H100 \(80 GiB\).*CUDA_VISIBLE_DEVICES"),
        (ClusterError("torch can't", why="no driver"), r"torch can't \(on host-n\); because no driver"),
        (NoAnswer("no answer within 120 s"), "the GPUs of host-n can't be queried; because no answer within 120 s"),
    ],
)
def test_a_node_whose_gpus_are_no_use_is_named(answers, answer, message):
    with pytest.raises(ClusterError, match=message):
        answers(n=answer)
