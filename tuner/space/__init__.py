"""Search spaces: YAML files that become define-by-run functions over `TrialConfig`, fully checked when they load."""

from tuner.space.dimension import Choice, FloatRange, IntRange, SuggestProtocol
from tuner.space.folders import list_spaces, load_space, space_folders
from tuner.space.search_space import SearchSpace

__all__ = [
    "Choice",
    "FloatRange",
    "IntRange",
    "SearchSpace",
    "SuggestProtocol",
    "list_spaces",
    "load_space",
    "space_folders",
]
