"""The groups of parts that a method's name is made of, in the order in which they add to a prompt."""

from pipelines.generate.parts.adapter import Adapter
from pipelines.generate.parts.base import GenerateRun, Part
from pipelines.generate.parts.oracle import Oracle
from pipelines.generate.parts.plug import Plug
from pipelines.generate.parts.profile import Profile
from pipelines.generate.parts.retrieval import Retrieval

GROUPS: tuple[type[Part], ...] = (Oracle, Profile, Retrieval, Plug, Adapter)
"""The words of the oracle stand in the request, the profile first, retrieved items behind it; then the persona rows."""


def open_parts(run: GenerateRun) -> list[Part]:
    """Opens the parts of the run's methods, a plug before retrieval that has to use its vectors.

    Raises:
        InputError: as `Part.open`.
    """
    wanted = [group for group in GROUPS if run.kinds(group.group)]
    opened = {group: group.open(run) for group in sorted(wanted, key=lambda group: group is not Plug)}
    return [opened[group] for group in wanted]
