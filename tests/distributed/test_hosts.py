"""Two hosts, one of which is cut off the network for a while: network namespaces joined by a cable."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import tomli_w
from ranks import losses, recipe_of

import lattice
from lattice.run_folder import read_metrics

NETWORK = "10.77.0."
CUT_AT = 15
"""Steps before the network fails."""


def ip(*words, check=True):
    subprocess.run(["ip", *words], check=check, capture_output=True)


@contextmanager
def two_hosts():
    """Two namespaces, by their names. Skips, and says why, where this machine does not let us make any."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made by `ip`, of Debian's iproute2, which is not installed")
    hosts = [f"lattice-{os.getpid()}-{number}" for number in (0, 1)]
    try:
        try:
            for host in hosts:
                ip("netns", "add", host)
            ip("link", "add", "cable", "netns", hosts[0], "type", "veth", "peer", "cable", "netns", hosts[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine forbids network namespaces: {error.stderr.decode().strip()}")
        for number, host in enumerate(hosts):
            ip("-n", host, "addr", "add", f"{NETWORK}{number + 1}/24", "dev", "cable")
            ip("-n", host, "link", "set", "cable", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            ip("netns", "del", host, check=False)


def start(host, number, recipe, run, log):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={NETWORK}1:29400", "--rdzv-id=job"]
    # Which host is which would be told by their names, if these were two machines.
    meeting += [f"--rdzv-conf=is_host={1 - number}", f"--local-addr={NETWORK}{number + 1}"]
    command = [
        *torchrun,
        *meeting,
        "--max-restarts=6",
        "-m",
        "lattice",
        "run",
        str(recipe),
        "--out",
        str(run),
    ]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "cable",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def wait_for(condition, seconds, what):
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


def test_a_host_that_is_cut_off_and_comes_back(tmp_path):
    """The job ends by its time limit, torchrun starts it again, and the losses are as if nothing happened."""
    recipe = recipe_of(
        run={"steps": 60, "timeout": 6.0},
        checkpoint={"kind": "dcp", "every": 5},
        parallel={"kind": "fsdp", "reshard": "step"},
    )
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    run, logs = tmp_path / "run", [tmp_path / f"host{number}.log" for number in (0, 1)]

    def said():
        return "\n".join(log.read_text()[-3000:] for log in logs)

    def steps():
        return [row["step"] for row in read_metrics(run / "metrics.jsonl") if "lr" in row]

    with two_hosts() as hosts:
        processes = [
            start(host, number, tmp_path / "recipe.toml", run, logs[number])
            for number, host in enumerate(hosts)
        ]
        try:
            wait_for(lambda: len(steps()) >= CUT_AT, 120, said)
            ip("-n", hosts[1], "link", "set", "cable", "down")
            time.sleep(9)
            done = len(steps())
            ip("-n", hosts[1], "link", "set", "cable", "up")
            wait_for(lambda: all(process.poll() is not None for process in processes), 180, said)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert [process.returncode for process in processes] == [0, 0], said()
    assert done < 60, "the network failed before the run was over"
    assert "no progress for" in said()
    assert steps() == list(range(1, 61)), "no step is missing, none is there twice"
    lattice.train({**recipe, "parallel": {"kind": "single"}}, out=tmp_path / "alone")
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
