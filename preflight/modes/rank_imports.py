"""What a rank needs, loaded once by multiprocessing's fork server, whose forks the ranks are.

So a start costs none of Python's and torch's seconds. Nothing here may touch a card, or start a
thread: neither outlives a fork. The server ends with its parent, and the ranks with it.
"""

import torch._dynamo  # FSDP would at its first call
import torch.distributed.fsdp  # noqa: F401

import preflight.modes.finetune
import preflight.modes.train  # noqa: F401
from preflight.core.processes import die_with_parent

die_with_parent()
