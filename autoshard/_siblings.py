"""Do `passes` and `cost_models` come from the same place as autoshard?  If not, importing says so.

Both names are generic: another project, or a folder in the current directory, may own them too.
Python would then import the wrong one and fail later, far from the cause. `import autoshard`
imports this module first.

>>> check_siblings()
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

SIBLINGS = ("passes", "cost_models")


def found_at(name: str) -> Path | None:
    """Where `import name` would find it, without importing it: a folder, a file, or nowhere."""
    try:
        spec = find_spec(name)
    except ValueError:  # imported already, by something that left no spec
        origin, folders = getattr(sys.modules[name], "__file__", None), None
    else:
        if spec is None:
            return None
        origin, folders = spec.origin, spec.submodule_search_locations
    if origin is None:  # a folder without __init__.py
        return next((Path(p).resolve() for p in folders or ()), None)
    file = Path(origin).resolve()
    return file.parent if file.name == "__init__.py" else file


def check_siblings(home: Path | None = None) -> None:
    """Raise ImportError unless both packages lie in `home`, by default where autoshard lies."""
    home = home or Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        wanted, found = home / name, found_at(name)
        if found != wanted:
            where = f"Python finds one at {found}" if found else "Python finds none"
            raise ImportError(
                f"autoshard needs its own package {name!r} at {wanted}, but {where}. Rename or"
                f" remove the other {name!r}, or start Python from another directory."
            )


check_siblings()
