"""A real Slurm of Debian's packages on two hosts of ours: the controller on the first, a node's daemon on each."""

import shutil
from dataclasses import dataclass

from tests.hosts import SHARED, Hosts, wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
_CONFIG = f"""
ClusterName=readapt
SlurmctldHost=node1({{head}})
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=/tmp/slurmctld
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile={SHARED}/slurmctld.log
SlurmdLogFile={SHARED}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
KillWait=5
{{nodes}}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
_MUNGE = f"mkdir -p /run/munge /tmp/slurmctld /tmp/slurmd && munged --force --key-file={SHARED}/munge.key"


@dataclass(frozen=True)
class Slurm:
    """Slurm's own commands, on the first host."""

    hosts: Hosts

    def said(self, *command: str, **environment: str) -> str:
        return self.hosts.nodes[0].run(*command, SLURM_CONF=f"{SHARED}/slurm.conf", **environment).strip()

    def is_done(self) -> bool:
        """Whether no job is left."""
        return not self.said("squeue", "--noheader")


def start(hosts: Hosts, num_cpus: int) -> Slurm:
    """Start the daemons and wait until all nodes are idle; they end with their hosts."""
    slurm = Slurm(hosts)
    nodes = [f"NodeName={node.name} NodeAddr={node.address} CPUs={num_cpus}" for node in hosts.nodes]
    config = _CONFIG.format(head=hosts.nodes[0].address, nodes="\n".join(nodes))
    (hosts.shared / "slurm.conf").write_text(config)
    shutil.copy("/etc/munge/munge.key", hosts.shared / "munge.key")
    (hosts.shared / "munge.key").chmod(0o400)
    for node in hosts.nodes:
        node.run("bash", "-c", _MUNGE)
    slurm.said("slurmctld")
    for node in hosts.nodes:
        node.run("slurmd", "-N", node.name, SLURM_CONF=f"{SHARED}/slurm.conf")
    wait_until(lambda: slurm.said("sinfo", "-h", "-o", "%D %t") == f"{len(hosts.nodes)} idle", "the nodes of Slurm")
    return slurm
