"""The searches by name."""

from __future__ import annotations

from .branch_search import branch_search
from .ensemble import ensemble
from .fresh_starts import best_of_n, coarse_first, noise_search
from .funnel import funnel
from .particles import particle_gibbs, particles
from .search import Method

METHODS: dict[str, Method] = {
    "best_of_n": best_of_n,
    "coarse_first": coarse_first,
    "branch_search": branch_search,
    "particles": particles,
    "funnel": funnel,
    "particle_gibbs": particle_gibbs,
    "noise_search": noise_search,
    "ensemble": ensemble,
}
"""What `search_settings.READS` names."""
