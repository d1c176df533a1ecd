"""What is found out about one module."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

OK, FAILS, WRONG, UNVERIFIED = "ok", "fails", "silently wrong", "unverified"


@dataclass(frozen=True)
class Finding:
    """What was found out about one module."""

    module: str  #: its name in the model; "" is the model itself
    type: str  #: its class
    status: str  #: "ok", "fails", "silently wrong" or "unverified"
    reason: str = ""
    fix: str = ""
    error: float = math.nan  #: relative error of double backward against central differences; NaN: not compared

    @property
    def at_fault(self) -> bool:
        return self.status in (FAILS, WRONG)


def because_of(findings: Sequence[Finding], most: int = 4) -> str:
    names = [f.module or "(model)" for f in findings]
    return f"because of {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")
