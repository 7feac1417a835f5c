"""The control loop of a running model: signals in, knobs out, every decision on record.

`Control.start(model, bounds)` begins one. docs/controllers.md says what it does.
"""

from edgert.controlling.bounds import Bounds, bounds_from
from edgert.controlling.loop import Control
from edgert.controlling.record import replay

__all__ = ["Bounds", "Control", "bounds_from", "replay"]
