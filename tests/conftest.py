"""How many examples hypothesis tries: as a rule 100 a test, thousands with `--hypothesis-profile fuzz`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz", max_examples=3_000, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
