"""What prediction promises, printed with its bars.

    python benchmarks/prediction.py [SECTION ...]

Sections: ``published`` (other people's measurements reproduced), ``simulation`` (its speed),
``from-study`` (`predict --from`: simulated studies, asked at other loads) and ``embedded``
(calibrated on the real engine, judged on waves it has not seen; minutes). A section is
a module beside this one and its function, which prints and says whether its bars are met.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

SECTIONS = {
    "published": ("prediction_published", "print_published"),
    "simulation": ("prediction_simulation", "print_speed"),
    "from-study": ("prediction_from_study", "known_truths"),
    "embedded": ("prediction_embedded", "print_embedded"),
}


def main(names: list[str]) -> int:
    """Print the sections; 0 where every bar is met, 2 for an unknown section."""
    unknown = set(names) - set(SECTIONS)
    if unknown:
        print(f"No section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
        return 2
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    missed = []
    for name in names or list(SECTIONS):
        module, function = SECTIONS[name]
        print(f"=== {name}")
        started = time.perf_counter()
        met = getattr(importlib.import_module(f"benchmarks.{module}"), function)()
        print(f"=== {name}: {'met' if met else 'MISSED'}, {time.perf_counter() - started:.0f} s\n")
        if not met:
            missed.append(name)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
