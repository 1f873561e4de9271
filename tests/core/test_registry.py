"""The registry's promises: a component that does not conform is refused where it is written, and the core
names no concrete component."""

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

import lattice
from lattice import registry
from lattice.protocols import ROLES, TABLES, Evaluator, Schedule

CORE = sorted(Path(lattice.__file__).parent.glob("*.py"))


@pytest.fixture(autouse=True)
def untouched_registry(monkeypatch):
    """What a test registers is gone after it."""
    for role in ROLES:
        registry.kinds(role)
    kinds = {role: dict(known) for role, known in registry._kinds.items()}
    monkeypatch.setattr(registry, "_kinds", kinds)


def schedule(**changes):
    """The body of a schedule that conforms, with `changes`."""
    return {"__annotations__": {}, "factor": lambda self, step, steps: 1.0, "__module__": __name__, **changes}


def make(name="Mine", bases=(Schedule,), *, frozen=True, kw_only=True, body=None):
    return dataclass(frozen=frozen, kw_only=kw_only)(type(name, bases, body or schedule()))


def test_a_conforming_component_is_known_by_its_kind():
    cls = registry.register("schedule", "flat")(make())
    assert registry.lookup("schedule", "flat") is cls
    assert cls.kind == "flat"
    assert "flat" in registry.kinds("schedule")
    assert list(registry.kinds("schedule")) == sorted(registry.kinds("schedule"))


def test_a_component_need_not_inherit_its_protocol():
    assert registry.register("schedule", "duck")(make(bases=())).kind == "duck"


def test_a_missing_method_is_named():
    with pytest.raises(TypeError, match=r"Mine is no schedule: 'factor' is missing .*protocols\.Schedule"):
        registry.register("schedule", "x")(make(body={"__annotations__": {}}))
    assert "x" not in registry.kinds("schedule")


def test_every_missing_method_and_option_is_named_at_once():
    with pytest.raises(TypeError) as caught:
        registry.register("optimizer", "x")(make(bases=(), body={"__annotations__": {}}))
    for name in ("'build' is missing", "option 'lr' is missing", "option 'grad_clip' is missing"):
        assert name in str(caught.value)


def test_no_option_is_called_kind():
    """A recipe could not tell it from the name of the component."""
    body = schedule(factor=lambda self, step, steps: 1.0) | {"__annotations__": {"kind": str}, "kind": "q"}
    with pytest.raises(TypeError, match="no option may be called 'kind', which names the component"):
        registry.register("schedule", "x")(make(body=body))


def test_other_argument_names_are_shown_beside_those_asked_for():
    body = schedule(factor=lambda self, at, steps: 1.0)
    with pytest.raises(TypeError, match=r"'factor' takes \(at, steps\), not \(step, steps\)"):
        registry.register("schedule", "x")(make(body=body))


def test_an_inherited_abstract_method_does_not_count():
    with pytest.raises(TypeError, match="'evaluate' is missing"):
        registry.register("evaluator", "x")(
            make(bases=(Evaluator,), body={"__annotations__": {"every": int}, "every": 0})
        )


@pytest.mark.parametrize("flags", [{"frozen": False}, {"kw_only": False}])
def test_a_dataclass_must_be_frozen_and_keyword_only(flags):
    body = schedule(__annotations__={"rate": float}, rate=1.0)
    with pytest.raises(TypeError, match=r"@dataclass\(frozen=True, kw_only=True\)"):
        registry.register("schedule", "x")(make(body=body, **flags))


def test_no_dataclass_at_all():
    with pytest.raises(TypeError, match="Plain must be decorated with @dataclass"):
        registry.register("schedule", "x")(type("Plain", (Schedule,), schedule()))


def test_a_subclass_that_forgot_the_decorator():
    """Its own annotations would silently be no options."""
    bare = type("Bare", (make(),), {"__annotations__": {"rate": float}, "rate": 1.0})
    with pytest.raises(TypeError, match="Bare must be decorated with @dataclass"):
        registry.register("schedule", "x")(bare)


def test_a_kind_is_given_once():
    registry.register("schedule", "mine")(make("First"))
    with pytest.raises(ValueError, match=r"kind 'mine' of role 'schedule' is already .*First"):
        registry.register("schedule", "mine")(make("Second"))
    assert registry.lookup("schedule", "mine").__name__ == "First"
    with pytest.raises(ValueError, match=r"'cosine' .* is already lattice\.components\.schedule\.cosine\."):
        registry.register("schedule", "cosine")(make())


def test_the_same_class_may_be_defined_again():
    """A notebook's cell that is run twice, or a file that is imported again after it was repaired."""
    registry.register("schedule", "mine")(make())
    again = make()
    registry.register("schedule", "mine")(again)
    assert registry.lookup("schedule", "mine") is again


def test_the_same_kind_of_another_role_is_another_component():
    registry.register("schedule", "perplexity")(make())
    assert registry.lookup("evaluator", "perplexity") is not registry.lookup("schedule", "perplexity")


def test_an_unknown_role_suggests_and_lists():
    with pytest.raises(registry.UnknownName) as caught:
        registry.register("shedule", "x")
    assert "role 'shedule' does not exist; did you mean 'schedule'?" in str(caught.value)
    assert all(role in str(caught.value) for role in ROLES)


def test_an_unknown_kind_suggests_and_lists():
    with pytest.raises(registry.UnknownName, match=r"kind 'cosin' .* did you mean 'cosine'\? Known: cosine"):
        registry.lookup("schedule", "cosin")
    with pytest.raises(registry.UnknownName) as caught:
        registry.lookup("schedule", "zzzzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("hiden_size", ["hidden_size", "num_layers"], "; did you mean 'hidden_size'?"),
        ("ARC-Easy", ["arc_easy", "arc_challenge"], "; did you mean 'arc_easy'?"),
        ("RACE", ["trace", "race"], "; did you mean 'race'?"),
        ("Nvidia-H100", ["NVIDIA-H100", "nvidia-a100"], "; did you mean 'NVIDIA-H100'?"),
        ("q", ["hidden_size"], "."),
        ("", [], "."),
    ],
)
def test_nearest(name, known, hint):
    assert registry.nearest(name, known) == hint


# ── the built-in kinds ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_a_kind_and_every_kind_explains_itself(role):
    known = registry.kinds(role)
    assert known
    for kind, cls in known.items():
        assert cls.kind == kind
        assert (cls.__doc__ or "").strip(), f"{role} {kind} has no docstring"
        assert ROLES[role].protocol in cls.__mro__, f"{role} {kind} does not inherit its Protocol"


def test_every_table_names_one_role():
    assert sorted(TABLES.values()) == sorted(ROLES)
    assert TABLES["evaluators"] == "evaluator"


# ── rules of the house ────────────────────────────────────────────────────────────────────────────
def parsed():
    return [(path.name, ast.parse(path.read_text(encoding="utf-8"))) for path in CORE]


def concrete(module):
    """`lattice.components.<role>.<module>`, or a role's package: the registry alone imports these."""
    return module == "lattice.components" or module.startswith("lattice.components.")


def test_the_core_is_here():
    assert {"recipe.py", "train.py", "assemble.py", "stack.py", "cli.py"} <= {path.name for path in CORE}


def test_the_core_imports_no_component():
    found = []
    for name, tree in parsed():
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
                assert node.level == 0, f"{name}:{node.lineno}: relative import"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                modules = [node.value] if node.value.startswith("lattice.components.") else []
                if name == "registry.py":
                    modules = [module for module in modules if module != "lattice.components."]
            found += [f"{name}:{node.lineno}: {module}" for module in modules if concrete(module)]
    assert found == []


def component_names():
    names = {role.protocol.__name__ for role in ROLES.values()}
    for role in ROLES:
        names |= {cls.__name__ for cls in registry.kinds(role).values()}
    return names


def test_the_core_asks_no_component_for_its_class():
    classes, found = component_names(), []
    for name, tree in parsed():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in (
                "isinstance",
                "issubclass",
            ):
                continue
            # `nn.Linear` is torch's; a component would be named bare, after `from … import`.
            asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
            found += [f"{name}:{node.lineno}: {one}" for one in asked & classes]
    assert found == []


def test_the_core_compares_no_kind():
    found = []
    for name, tree in parsed():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            reads = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            literals = [part for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)]
            if "kind" in reads and any(isinstance(part.value, str) for part in literals):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


def test_components_are_plain_data():
    """Frozen and comparable by value, so that a resolved recipe can be compared with another."""
    for role in ROLES:
        for cls in registry.kinds(role).values():
            assert cls.__dataclass_params__.frozen
            assert cls.__dataclass_params__.eq
            assert all(option.kw_only for option in dataclasses.fields(cls) if option.init)


@pytest.mark.parametrize("role", ROLES)
def test_every_shipped_kind_says_what_it_is(role):
    """`lattice components` shows the first line; a dataclass without one shows its signature instead."""
    for kind, cls in registry.kinds(role).items():
        if not cls.__module__.startswith("lattice.components"):
            continue  # of another test
        first = (cls.__doc__ or "").splitlines()[0]
        assert first.endswith((".", ":")) or len(first) > 60, (kind, first)
        assert not first.startswith(f"{cls.__name__}("), kind


# ── what a recurrence builds ──────────────────────────────────────────────────────────────────────
VARIANT = '''
from dataclasses import dataclass
from lattice import register
from lattice.protocols import Pass, Recurrence, Unroll, Unrolled

@register("recurrence", "KIND")
@dataclass(frozen=True, kw_only=True)
class Mine(Recurrence):
    """A user's own."""

    DECORATOR
    def passes(self, ARGUMENTS):
        return [Pass()]

    def build(self, shape):
        return MineUnroll()

class MineUnroll(Unroll):
    def __call__(self, CALL):
        return Unrolled(stack.run(stack.embed(ids_BL).unsqueeze(2), cache=cache).squeeze(2))

    def step(self, STEP):
        return self(stack, ids_B1, cache=cache).hidden_BLD
'''
RIGHT = {
    "DECORATOR": "",
    "ARGUMENTS": "shape, *, training",
    "CALL": "stack, ids_BL, *, draw=None, cache=None",
    "STEP": "stack, ids_B1, cache",
}
MISFITS = [
    ({"CALL": "stack, ids_BL, *, draw=None"}, "'__call__' takes .*: it lacks the argument 'cache'"),
    ({"CALL": "stack, ids_BL, *, draw, kv"}, "lacks the argument 'cache', has an unknown argument 'kv'"),
    ({"CALL": "stack, ids, *, draw, cache"}, "lacks the argument 'ids_BL', has an unknown argument 'ids'"),
    (
        {"STEP": "stack, cache, ids_B1"},
        r"'step' takes \(stack, cache, ids_B1\), not \(stack, ids_B1, cache\)",
    ),
    ({"ARGUMENTS": "training"}, r"'passes' takes \(training\), not \(shape, training\)"),
    ({"DECORATOR": "def parallel_is_exact(self): return True\n"}, "'parallel_is_exact' must be a property"),
    ({"DECORATOR": "@property", "ARGUMENTS": ""}, "'passes' must be a method"),
]


def write_variant(folder, kind, **changes):
    text = VARIANT.replace("KIND", kind)
    for name, value in {**RIGHT, **changes}.items():
        text = text.replace(name, value)
    path = folder / f"{kind}.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_a_variant_that_does_not_fit_is_refused_at_import(tmp_path, number):
    kind, (changes, message) = f"misfit_{number}", MISFITS[number]
    path = write_variant(tmp_path, kind, **changes)
    with pytest.raises(ImportError, match=message) as caught:
        registry.import_user_code(str(path), tmp_path)
    assert path.name in str(caught.value)
    assert kind not in registry.kinds("recurrence")
    write_variant(tmp_path, kind, DECORATOR="# repaired, it imports in the same process\n")
    registry.import_user_code(str(path), tmp_path)
    assert kind in registry.kinds("recurrence")


@pytest.mark.parametrize("held", ["torch.ones(2)", "torch.nn.Linear(2, 2)"])
def test_what_is_no_module_holds_no_tensors(tmp_path, held):
    path = write_variant(tmp_path, "holding")
    text = path.read_text().replace("MineUnroll()", f"MineUnroll({held})")
    init = "class MineUnroll(Unroll):\n    def __init__(self, held):\n        self.held = held\n"
    path.write_text("import torch\n" + text.replace("class MineUnroll(Unroll):", init))
    with pytest.raises(
        ImportError, match=r"MineUnroll is no Unroll: 'held' needs a module .*register_buffer"
    ):
        registry.import_user_code(str(path), tmp_path)


def test_what_could_not_be_built_at_import_is_looked_at_in_the_model(tmp_path):
    path = write_variant(tmp_path, "late", CALL="stack, ids_BL", DECORATOR="size: int")
    registry.import_user_code(str(path), tmp_path)
    tables = {"backbone": {"kind": "llama"}, "recurrence": {"kind": "late", "size": 3}}
    with pytest.raises(TypeError, match=r"MineUnroll is no Unroll: .*lacks the argument 'draw'"):
        lattice.build_model(tables, device="meta")
