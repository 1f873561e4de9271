"""The kinds that lattice brings along, whatever other tests of the same process have registered."""

from lattice import registry


def built_in(role: str) -> set[str]:
    kinds = registry.kinds(role).items()
    return {kind for kind, cls in kinds if cls.__module__.startswith("lattice.components")}
