"""The pluggable parts, one folder a role. They are imported as `lattice.components`."""

if __name__ != "lattice.components":
    raise ImportError("import these as lattice.components: this folder is no package of its own")
