"""All sample equations, family by family.

>>> len(all_samples()) > 300
True
"""

from __future__ import annotations

from functools import cache

from autoshard.rule_samples import Sample
from autoshard.rule_samples_elementwise import elementwise_samples
from autoshard.rule_samples_places import place_samples
from autoshard.rule_samples_shape import shape_samples


@cache
def all_samples() -> tuple[Sample, ...]:
    """Every sample."""
    return (*elementwise_samples(), *shape_samples(), *place_samples())
