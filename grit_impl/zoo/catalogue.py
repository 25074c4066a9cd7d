"""All cases: importing the modules that enter them."""

from __future__ import annotations

from grit_impl.zoo import faults, faults_of_change, faults_of_effect, sound, sound_links
from grit_impl.zoo.cases import FAULTS, SOUND

MODULES = (faults, faults_of_change, faults_of_effect, sound, sound_links)

__all__ = ["FAULTS", "SOUND"]
