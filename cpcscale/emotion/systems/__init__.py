"""The systems by name: what a recogniser can take as input."""

from __future__ import annotations

from cpcscale import config
from cpcscale.emotion.systems.duration import Duration
from cpcscale.emotion.systems.functionals import Functionals
from cpcscale.emotion.systems.fusion import JOINED, fusion
from cpcscale.emotion.systems.logmel import LogMel
from cpcscale.emotion.systems.mean import Mean
from cpcscale.emotion.systems.mfcc import MFCC
from cpcscale.emotion.systems.minicpc import MiniCPC
from cpcscale.emotion.systems.precpc import Pretrained
from cpcscale.emotion.systems.prosody import Prosody
from cpcscale.emotion.systems.random import Random
from cpcscale.emotion.systems.raw import Raw
from cpcscale.emotion.systems.system import System

# The controls, the classic systems, then the paper's four and log-mel.
SYSTEMS: dict[str, System] = {
    each.name: each
    for each in (
        *(Mean(), Random(), Duration()),
        *(Functionals(), Prosody()),
        *(MFCC(), LogMel(), Raw(), MiniCPC(), Pretrained()),
    )
}


def system_of(name: str, key: str = "system") -> System:
    """The system of this name; of names joined by +, their fusion. Raises UserError for other names of the `key`."""
    if JOINED in name:
        return fusion(key, name, SYSTEMS)
    config.check_choice(key, name, list(SYSTEMS))
    return SYSTEMS[name]
