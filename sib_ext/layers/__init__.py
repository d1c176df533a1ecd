"""Feature maps: the places in a model that have one, their capture, the last one's search, their class activation."""

from .layout import class_activation_of
from .places import captured, check_places
from .search import find_feature_map, last_feature_map

__all__ = ["captured", "check_places", "class_activation_of", "find_feature_map", "last_feature_map"]
