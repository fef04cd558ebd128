"""The flags of a run on several processes, one for each card."""

from dataclasses import dataclass

from preflight.settings.options import setting


@dataclass(frozen=True)
class ProcessSettings:
    """How many processes (ranks) share a run, and on which hosts."""

    ranks: int | None = setting(
        None,
        "processes that share the run, one for each card; unset: all cards that are present for "
        "--train, --finetune and --get-optimal-bs, one for --check and for --target-gpu",
        ge=1,
        le=65_536,
    )
    hosts: int = setting(1, "machines that the ranks are spread over evenly", ge=1, le=8192)
    network_gbits: float | None = setting(
        None,
        "network between the hosts, in Gb/s for each card; unset: 100 is assumed",
        flag="--network",
        gt=0,
        le=100_000,
        metavar="GBITS",
    )

    def find_faults(self) -> list[str]:
        """Faults that one flag alone does not show, each with the flag to change."""
        if self.hosts > 1 and self.ranks is None:
            return ["--hosts also needs --ranks, the processes of all hosts together"]
        if (self.ranks or 1) % self.hosts:
            return [f"--ranks {self.ranks} must be a multiple of --hosts {self.hosts}"]
        return []
