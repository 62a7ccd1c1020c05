"""Settings for the network of another machine: without effect on one process, and named where there are several."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from mf_dist.runtime.distributed import check_host_name, interface_problem, process_group
from mf_dist.runtime.errors import SharedError, UserError

OF_A_CLUSTER = {
    "GLOO_SOCKET_IFNAME": "ib0",
    "GLOO_DEVICE_TRANSPORT": "IBVERBS",
    "NCCL_SOCKET_IFNAME": "ib0",
    "NCCL_NET": "IB",
    "TP_SOCKET_IFNAME": "ib0",
    "MASTER_ADDR": "node17.invalid",
    "MASTER_PORT": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "https_proxy": "http://proxy.invalid:3128",
}


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """launched(rank, **variables): as a launcher of two processes starts it. Restores what a process group sets."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *OF_A_CLUSTER):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def launch(rank, **variables):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", **variables}.items():
            monkeypatch.setenv(name, value)

    return launch


def test_one_process_needs_no_network(monkeypatch):
    for name, value in OF_A_CLUSTER.items():
        monkeypatch.setenv(name, value)
    with process_group() as ranks:
        number = torch.ones(3)
        for group in (None, dist.new_group([0])):  # DeepSpeed makes further ones
            dist.all_reduce(number, group=group)
        assert ranks.world_size == 1 and number.tolist() == [1, 1, 1]
    assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ  # DeepSpeed refuses one that is not LOCAL_RANK


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_name_the_variable_once_a_machine(launched, rank):
    launched(rank, GLOO_SOCKET_IFNAME="lo,ib0")
    with (
        pytest.raises(
            UserError, match="GLOO_SOCKET_IFNAME is 'lo,ib0': no interface ib0 .* has lo.* unset it"
        ) as error,
        process_group(),
    ):
        pass
    assert isinstance(error.value, SharedError) == (rank == 1)


def test_nccl_takes_prefixes_names_and_exclusions(monkeypatch):
    present = [name for _, name in socket.if_nameindex()]
    for text in ("l", "ib,lo", "=lo", "^ib", "^=l", ""):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", text)
        assert interface_problem(uses_nccl=True) == "", text
    for text in ("ib", "=l", "=ib0,l", f"^{','.join(present)}", f"^={','.join(present)}"):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", text)
        assert "NCCL_SOCKET_IFNAME" in interface_problem(uses_nccl=True), text
        assert interface_problem(uses_nccl=False) == "", text


def test_a_host_name_without_an_address_is_named(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node17.invalid")
    with pytest.raises(UserError, match=r"node17.invalid resolves to no address, .*: set GLOO_SOCKET_IFNAME to"):
        check_host_name()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    check_host_name()
