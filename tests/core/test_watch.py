"""Whom the others wait for, and a time limit that no clock disturbs."""

import json
import time

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lattice.hardware import choose_device
from lattice.launch import Agreed, Elsewhere, Launch
from lattice.rank_log import RankLog
from lattice.watch import EXIT, Watch, culprits
from lattice.world import World, lost

BEAT = {"count": 5, "places": 7, "waits": True, "place": "step 3 (backward)"}


def beats(size, **changed):
    """All ranks alive, at one place, waiting; but for the changed ones."""
    return {rank: {**BEAT, **changed.get(f"rank{rank}", {})} for rank in range(size)}


def later(before):
    return {rank: {**beat, "count": beat["count"] + 3} for rank, beat in before.items()}


@given(size=st.integers(2, 9), data=st.data())
def test_the_one_at_fault_is_named_and_no_other(size, data):
    rank = data.draw(st.integers(0, size - 1))
    me = data.draw(st.integers(0, size - 1).filter(lambda one: one != rank))
    change, words = data.draw(
        st.sampled_from(
            [
                ({"places": 6, "place": "step 3 (forward)"}, "hangs at step 3 (forward)"),
                ({"places": 2, "waits": False, "place": "step 1 (data)"}, "hangs at step 1 (data)"),
                ({"waits": False}, "hangs at step 3 (backward)"),
            ]
        )
    )
    before = beats(size, **{f"rank{rank}": change})
    assert culprits(before, later(before), me) == f"rank {rank} {words}"
    silent = later(before) | {rank: before[rank]}
    assert (
        culprits(before, silent, me)
        == f"rank {rank} is stopped, gone or cut off, since {before[rank]['place']}"
    )


def test_where_all_wait_alike_nobody_is_accused():
    before = beats(4)
    assert culprits(before, later(before), 2).startswith("all ranks wait at the same place")


def watching(folder, monkeypatch, timeout=0.4):
    """A watch of rank 0 of two, and what it gave up with."""
    ended = []
    world = World(Launch(rank=0, size=2, local_size=2))
    with RankLog(folder, world) as log:
        watch = Watch(folder, world, timeout, log)
        monkeypatch.setattr(watch, "give_up", ended.append)
    return watch, ended


def test_a_clock_that_jumps_ends_nothing(tmp_path, monkeypatch):
    watch, ended = watching(tmp_path, monkeypatch)
    times = iter([1e9, 2e9, -5.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(times))
    with watch.on():
        for step in range(8):
            watch.at(step, "forward")
            time.sleep(0.1)
    assert ended == []


def test_no_progress_ends_with_the_culprit_in_the_log(tmp_path, monkeypatch, capsys):
    watch, ended = watching(tmp_path, monkeypatch)
    with watch.on():
        watch.at(3, "update")
        time.sleep(1.0)
    assert set(ended) == {EXIT}
    rows = [json.loads(line) for line in (tmp_path / "ranks" / "00000.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows][:4] == ["start", "end", "stalled", "fault"]
    assert "rank 1 is stopped, gone or cut off, since the start" in rows[3]["message"]
    assert "step 3 (update)" in capsys.readouterr().err


@pytest.mark.parametrize("alive", [True, False])
def test_an_evaluation_takes_as_long_as_it_takes_while_all_are_alive(tmp_path, monkeypatch, alive):
    watch, ended = watching(tmp_path, monkeypatch, timeout=0.3)
    (tmp_path / "ranks").mkdir(exist_ok=True)
    other = tmp_path / "ranks" / "00001.beat"
    other.write_text(json.dumps({**BEAT, "count": 1}))
    with watch.on():
        watch.at(3, "evaluation")
        for count in range(2, 40):
            if alive:
                other.with_suffix(".next").write_text(json.dumps({**BEAT, "count": count}))
                other.with_suffix(".next").replace(other)
            time.sleep(0.03)
    assert set(ended) == (set() if alive else {EXIT})


def test_one_rank_on_each_host_tells_what_all_know():
    ranks = [Launch(rank=rank, size=4, local_rank=rank % 2, local_size=2) for rank in range(4)]
    assert [rank.tells(Agreed("all")) for rank in ranks] == [True, False, True, False]
    assert [rank.tells(ValueError("mine")) for rank in ranks] == [True] * 4
    assert [rank.tells(Elsewhere("theirs")) for rank in ranks] == [False] * 4


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [("RANK", "x", {}), ("RANK", "2", {"WORLD_SIZE": "2"}), ("LOCAL_RANK", "-1", {}), ("WORLD_SIZE", "", {})],
)
def test_an_environment_that_no_launcher_makes(name, value, others):
    with pytest.raises(ValueError, match=f"{name} = '{value}'"):
        Launch.here({name: value, **others})


def test_a_numbered_gpu_is_refused_where_ranks_would_share_it():
    launch = Launch(rank=1, size=2, local_rank=1, local_size=2)
    with pytest.raises(Agreed, match=r"^run\.device = 'cuda:1': the 2 processes .* must be auto or cuda"):
        choose_device("cuda:1", launch=launch)
    assert choose_device("cpu", launch=launch).type == "cpu"


NCCL = "NCCL error in: NCCLUtils.cpp:94, {}, NCCL version 2.28.9\n{}: A call failed.\nLast error:\n{}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            dist.DistBackendError(
                NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "'out of memory'")
            ),
            None,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (
            dist.DistBackendError(
                NCCL.format("remote process exited", "ncclRemoteError", "socketProgress: closed\nby peer")
            ),
            "remote process exited, NCCL version 2.28.9 socketProgress: closed by peer",
        ),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"),
            "closed by peer",
        ),
        (dist.DistNetworkError("The client socket has timed out\nException raised from"), "has timed out"),
    ],
)
def test_ranks_are_called_lost_only_where_they_are(error, reason):
    said = lost(error)
    assert said is None if reason is None else reason in said and "\n" not in said
