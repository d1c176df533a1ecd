"""The demo's network, under its former name; see :mod:`sib_lab.networks`."""

from .networks import SmallCNN

__all__ = ["GRAD_CAM_LAYER", "SmallCNN"]

#: Name of the module whose output Grad-CAM looks at: the last block with a feature map (10 x 10 for 40 px images).
GRAD_CAM_LAYER = "block4"
